"""Baselines from ``transformers``, built from the same ``ModelConfig`` as the models of tnnlm.

``glu_dim`` is the width of the MLP of Transformers. Causal models have the methods of ``CausalLM``, with the
cache as the state; encoders have the inputs and losses of ``MaskedLM`` and ``SequenceClassifier``.

Raises:
    UserError: If ``transformers`` is not installed, or ``d_model`` can't be split into attention heads.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError

_HEAD = 64


class Peer(nn.Module):
    """Causal language model for whole sequences and for decoding with a KV cache as its state, which
    ``prefill`` and ``step`` change in place and ``undo`` rolls back."""

    net: Any

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, L, V) of tokens (B, L)."""
        logits: Tensor = self.net(input_ids=tokens, use_cache=False).logits
        return logits

    def init_state(self, batch_size: int) -> Any:
        """Return an empty cache, for any batch size."""
        return transformers_library().DynamicCache()

    def prefill(self, tokens: Tensor, state: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Process tokens (B, L) after those of the cache: return logits (B, keep or L, V) and the cache."""
        out = self.net(input_ids=tokens, past_key_values=state, use_cache=True, logits_to_keep=keep)
        return out.logits, state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process one token per row (B,): return logits (B, V) and the state."""
        logits, state = self.prefill(tokens[:, None], state)
        return logits[:, -1], state

    def undo(self, state: Any) -> None:
        """Remove the last token from the cache."""
        state.crop(-1)


class Llama(Peer):
    """Llama with rotary position embeddings, tied embeddings and no dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings = transformers_library().LlamaConfig(
            **_shape(config),
            num_key_value_heads=n_heads(config.d_model),
            max_position_embeddings=max(1 << 14, 16 * config.max_length),
            initializer_range=0.02,
            attention_dropout=0.0,
            tie_word_embeddings=True,
            use_cache=False,
        )
        self.net = transformers_library().LlamaForCausalLM(settings)


class GPT2(Peer):
    """GPT-2 with learned position embeddings up to the training length, tied embeddings and no dropout.

    Positions past the training length get random vectors from the initialisation: a longer table would hold
    the same, since these positions are never trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings = transformers_library().GPT2Config(
            **_shape(config),
            n_positions=config.max_length,
            n_inner=config.glu_dim or config.d_model,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **dict.fromkeys(("bos_token_id", "eos_token_id")),
            use_cache=False,
        )
        self.net = transformers_library().GPT2LMHeadModel(settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, L, V) of tokens (B, L), for any L."""
        self._lengthen(tokens.shape[1])
        return super().forward(tokens)

    def prefill(self, tokens: Tensor, state: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Process tokens (B, L) after those of the cache: return logits (B, keep or L, V) and the cache."""
        self._lengthen(state.get_seq_length() + tokens.shape[1])
        return super().prefill(tokens, state, keep)

    @torch.no_grad()
    def _lengthen(self, length: int) -> None:
        table = self.net.transformer.wpe
        missing = length - table.num_embeddings
        if missing <= 0:
            return
        generator = torch.Generator().manual_seed(table.num_embeddings)
        added = torch.randn(missing, table.embedding_dim, generator=generator)
        added = (added * self.net.config.initializer_range).to(table.weight)
        self.net.transformer.wpe = nn.Embedding.from_pretrained(torch.cat((table.weight, added)))


class Mamba(Peer):
    """Mamba, a selective state-space model with a state of fixed size; a CPU prefills it token by token."""

    STATE = 16
    """State numbers per channel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings = transformers_library().MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            state_size=self.STATE,
            num_hidden_layers=config.n_layers,
            tie_word_embeddings=True,
        )
        self.net = transformers_library().MambaForCausalLM(settings)

    def init_state(self, batch_size: int) -> Any:
        """Return None; the first ``prefill`` creates the state."""
        return None

    def prefill(self, tokens: Tensor, state: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Process tokens (B, L) after those of the state: return logits (B, L, V) and the state."""
        out = self.net(input_ids=tokens, cache_params=state, use_cache=True)
        return out.logits, out.cache_params

    def undo(self, state: Any) -> None:
        """Do nothing; the time of a step does not depend on the tokens before it."""


class Bert(nn.Module):
    """BERT as published (arXiv 1810.04805): learned position embeddings, post-norm, tied embeddings. It can't
    process sequences longer than the training length."""

    net: Any

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = transformers_library().BertForMaskedLM(_bert_settings(config))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return logits (B, M, V) at ``positions`` (B, M) of tokens (B, L)."""
        logits: Tensor = self.net.cls(_at(positions, self.net.bert(input_ids=tokens).last_hidden_state))
        return logits


class RotaryBert(Bert):
    """ModernBERT (arXiv 2412.13663) with rotary position embeddings, pre-norm, gated MLP and full attention
    in every layer."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        tokens = ("bos_token_id", "cls_token_id", "sep_token_id", "eos_token_id", "pad_token_id")
        settings = transformers_library().ModernBertConfig(
            **_shape(config),
            max_position_embeddings=max(1 << 13, 8 * config.max_length),
            layer_types=["full_attention"] * config.n_layers,
            **dict.fromkeys(("embedding_dropout", "mlp_dropout", "attention_dropout"), config.dropout),
            **dict.fromkeys(tokens),
        )
        self.net = transformers_library().ModernBertForMaskedLM(settings)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return logits (B, M, V) at ``positions`` (B, M) of tokens (B, L)."""
        x = self.net.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        logits: Tensor = self.net.decoder(self.net.head(_at(positions, x)))
        return logits


class BertClassifier(nn.Module):
    """BERT encoder with the pooled head of ``SequenceClassifier``, so that only the mixer differs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = transformers_library().BertModel(_bert_settings(config), add_pooling_layer=False)
        self.head = nn.Linear(config.d_model, config.n_classes)
        self.n_positions = config.max_length * config.d_model
        """Number of parameters of the position embeddings."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return logits (B, C) of tokens (B, L), of which the first ``lengths`` (B,) are not padding."""
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        x = self.net(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        logits: Tensor = self.head(x.masked_fill(~mask[:, :, None], 0.0).sum(1) / lengths[:, None])
        return logits


def _at(positions: Tensor, x: Tensor) -> Tensor:
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


def _shape(config: ModelConfig) -> dict[str, Any]:
    """Return the sizes under the names that most configurations of ``transformers`` use."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.glu_dim or config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": n_heads(config.d_model),
        "attn_implementation": "sdpa",
    }


def _bert_settings(config: ModelConfig) -> Any:
    return transformers_library().BertConfig(
        **_shape(config),
        max_position_embeddings=config.max_length,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )


def n_heads(width: int) -> int:
    """Return the largest number of heads of an even width of at least 64 channels, or else 1.

    Raises:
        UserError: If the width is odd.
    """
    heads = [n for n in range(1, max(1, width // _HEAD) + 1) if width % (2 * n) == 0]
    if not heads:
        raise UserError(f"model.d_model={width}: is odd; attention needs an even width")
    return heads[-1]


def transformers_library() -> ModuleType:
    """Import ``transformers``.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        remedy = "run `pip install -c constraints.txt -e '.[peers]'`"
        raise UserError(f"transformers: not installed ({error})", remedy) from None
    return transformers
