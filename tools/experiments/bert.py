"""Transformers that see both sides, of ``transformers``: the peers of ``encoder.MaskedLM``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from experiments.family_peers import n_heads, transformers_library
from tnnlm.config.schema import ModelConfig
from tnnlm.models.batches import MaskedBatch

_HEAD = 64


class Bert(nn.Module):
    """As published (Devlin et al., arXiv 1810.04805): learned positions up to the training length, norms
    after each sum, tied embeddings; ``glu_dim`` is the width of its MLP.

    It has no position past the training length, and can't read more.

    Raises:
        UserError: if ``transformers`` is missing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        library, settings = bert_settings(config)
        self.net = library.BertForMaskedLM(settings)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, M, V) at ``positions`` (B, M) of tokens (B, L)."""
        x = self.net.bert(input_ids=tokens).last_hidden_state
        logits: Tensor = self.net.cls(x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2])))
        return logits

    def loss(self, batch: MaskedBatch) -> Tensor:
        """Mean cross-entropy in nats per token to be guessed."""
        logits = self(batch.tokens, batch.positions)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


class RotaryBert(Bert):
    """A ModernBERT (arXiv 2412.13663): rotary positions, norms first, gated MLP; attention over all in every
    layer.

    Raises:
        UserError: if ``transformers`` is missing.
    """

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        library = transformers_library()
        tokens = ("bos_token_id", "cls_token_id", "sep_token_id", "eos_token_id", "pad_token_id")
        settings = library.ModernBertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=n_heads(config.d_model),
            intermediate_size=config.glu_dim or config.d_model,
            max_position_embeddings=max(1 << 13, 8 * config.max_length),
            layer_types=["full_attention"] * config.n_layers,
            embedding_dropout=config.dropout,
            mlp_dropout=config.dropout,
            attention_dropout=config.dropout,
            attn_implementation="sdpa",
            **dict.fromkeys(tokens),
        )
        self.net = library.ModernBertForMaskedLM(settings)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, M, V) at ``positions`` (B, M) of tokens (B, L)."""
        x = self.net.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))
        logits: Tensor = self.net.decoder(self.net.head(x))
        return logits


def bert_settings(config: ModelConfig) -> tuple[ModuleType, Any]:
    """The package, and a ``BertConfig`` of the sizes of one of our models.

    Raises:
        UserError: if ``transformers`` is missing.
    """
    transformers = transformers_library()
    width = config.d_model
    heads = max(n for n in range(1, max(1, width // _HEAD) + 1) if width % n == 0)
    settings = transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        num_hidden_layers=config.n_layers,
        num_attention_heads=heads,
        intermediate_size=config.glu_dim or width,
        max_position_embeddings=config.max_length,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        attn_implementation="sdpa",
    )
    return transformers, settings
