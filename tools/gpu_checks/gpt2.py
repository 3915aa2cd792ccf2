"""GPT-2 (Radford et al. 2019) in PyTorch alone, a baseline of training speed without Transformers.

Attention is ``scaled_dot_product_attention``, on a GPU with the flash kernel only (arXiv 2307.08691).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

_HEAD = 64
"""Channels per head."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (B, L, D) for x (B, L, D)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT2(nn.Module):
    """Language model with learned positions, pre-norm blocks and a tied head, without dropout."""

    def __init__(self, width: int, layers: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, L, V) of tokens (B, L)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return linear(self.norm(x), self.embedding.weight)

    def loss(self, rows: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token of rows of token ids (B, L + 1)."""
        with self._flash(rows.device):
            logits = self(rows[:, :-1])
        return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    def flops_per_token(self, length: int) -> float:
        """Return the operations per token, forward and backward: 6 per weight of a product, and attention."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        matrices += self.embedding.weight.numel()
        width = self.embedding.embedding_dim
        # Scores and their product with the values, 2 L D each forward, of which causal attention needs half.
        return 6.0 * matrices + 3 * 4 * length * width * len(self.blocks) / 2

    def _flash(self, device: torch.device) -> Any:
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext()
