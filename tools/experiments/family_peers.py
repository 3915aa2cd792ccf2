"""Transformers beside our families, of the same sizes and with the methods of a ``CausalLM``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError

_HEAD = 64


class Peer(nn.Module):
    """A causal language model of ``transformers`` in both forms: whole sequences, or with a cache of keys
    and values as its state, which ``prefill`` and ``step`` change in place."""

    net: Any

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) for tokens (B, L)."""
        logits: Tensor = self.net(input_ids=tokens, use_cache=False).logits
        return logits

    def init_state(self, batch_size: int) -> Any:
        """An empty cache, of any batch size."""
        return transformers_library().DynamicCache()

    def prefill(self, tokens: Tensor, state: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Read tokens (B, L) on top of the cache: logits (B, keep or L, V)."""
        out = self.net(input_ids=tokens, past_key_values=state, use_cache=True, logits_to_keep=keep)
        return out.logits, state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one token per row (B,): logits (B, V)."""
        logits, state = self.prefill(tokens[:, None], state)
        return logits[:, -1], state


class Transformer(Peer):
    """A Llama: rotary positions, tied embeddings, no dropout; ``glu_dim`` is the width of its MLP.

    Raises:
        UserError: if ``transformers`` is missing, or the width can't be split into heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        library = transformers_library()
        heads = n_heads(config.d_model)
        settings = library.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.glu_dim or config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max(1 << 14, 16 * config.max_length),
            initializer_range=0.02,
            attention_dropout=0.0,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.net = library.LlamaForCausalLM(settings)


class LearnedPositions(Peer):
    """A GPT-2: a learned vector for each position up to the training length, tied embeddings, no dropout.

    Positions past the training length get vectors as they are drawn at initialisation: what a longer table
    would hold there, since no such position was ever trained.

    Raises:
        UserError: if ``transformers`` is missing, or the width can't be split into heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        library = transformers_library()
        settings = library.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_length,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=n_heads(config.d_model),
            n_inner=config.glu_dim or config.d_model,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.net = library.GPT2LMHeadModel(settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) for tokens (B, L), L of any length."""
        self._lengthen(tokens.shape[1])
        return super().forward(tokens)

    def prefill(self, tokens: Tensor, state: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Read tokens (B, L) on top of the cache: logits (B, keep or L, V)."""
        self._lengthen(state.get_seq_length() + tokens.shape[1])
        return super().prefill(tokens, state, keep)

    @torch.no_grad()
    def _lengthen(self, length: int) -> None:
        table = self.net.transformer.wpe
        missing = length - table.num_embeddings
        if missing <= 0:
            return
        generator = torch.Generator().manual_seed(table.num_embeddings)
        drawn = torch.randn(missing, table.embedding_dim, generator=generator)
        drawn = (drawn * self.net.config.initializer_range).to(table.weight)
        self.net.transformer.wpe = nn.Embedding.from_pretrained(torch.cat((table.weight, drawn)))


def n_heads(width: int) -> int:
    """As many heads of 64 channels as there is room for, of an even number of channels each.

    Raises:
        UserError: if the width is odd.
    """
    heads = [n for n in range(1, max(1, width // _HEAD) + 1) if width % (2 * n) == 0]
    if not heads:
        raise UserError(f"attention needs an even model.d_model, not {width}")
    return heads[-1]


def transformers_library() -> ModuleType:
    """The package.

    Raises:
        UserError: if it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"needs the package transformers: pip install -c constraints.txt -e '.[peers]' ({error})"
        ) from None
    return transformers
