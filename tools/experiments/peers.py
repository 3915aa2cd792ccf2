"""Models of ``transformers`` beside ours, all made of the same ``ModelConfig``: its sizes are theirs too.

``glu_dim`` is the width of the MLP of what attends. Causal ones have the methods of a ``CausalLM``, their
cache as the state; encoders take what ``MaskedLM`` and ``SequenceClassifier`` take, and their losses.

Raises:
    UserError: every one of them, if ``transformers`` is missing; those with attention, if the width can't
        be split into heads.
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
    """A causal language model in both forms: whole sequences, or with a cache of keys and values as its
    state, which ``prefill`` and ``step`` change in place and ``undo`` sets back."""

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

    def undo(self, state: Any) -> None:
        """Forget the last token."""
        state.crop(-1)


class Llama(Peer):
    """Rotary positions, tied embeddings, no dropout."""

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
    """A learned vector for each position up to the training length, tied embeddings, no dropout.

    Positions past the training length get vectors as they are drawn at initialisation: what a longer table
    would hold there, since no such position was ever trained.
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


class Mamba(Peer):
    """A selective state-space model: its state doesn't grow, and it reads prompts in a loop on a CPU."""

    STATE = 16
    """state numbers per channel"""

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
        """None: the first tokens make it."""
        return None

    def prefill(self, tokens: Tensor, state: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Read tokens (B, L) on top of the state: logits (B, L, V)."""
        out = self.net(input_ids=tokens, cache_params=state, use_cache=True)
        return out.logits, out.cache_params

    def undo(self, state: Any) -> None:
        """Nothing: a step takes as long after any token."""


class Bert(nn.Module):
    """As published (Devlin et al., arXiv 1810.04805): learned positions up to the training length, norms
    after each sum, tied embeddings. It has no position past the training length, and can't read more."""

    net: Any

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = transformers_library().BertForMaskedLM(_bert_settings(config))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, M, V) at ``positions`` (B, M) of tokens (B, L)."""
        logits: Tensor = self.net.cls(_at(positions, self.net.bert(input_ids=tokens).last_hidden_state))
        return logits


class RotaryBert(Bert):
    """A ModernBERT (arXiv 2412.13663): rotary positions, norms first, gated MLP; attention over all in every
    layer."""

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
        """Logits (B, M, V) at ``positions`` (B, M) of tokens (B, L)."""
        x = self.net.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        logits: Tensor = self.net.decoder(self.net.head(_at(positions, x)))
        return logits


class BertClassifier(nn.Module):
    """A BERT's encoder with the pooled head of our ``SequenceClassifier``: attention is all that differs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = transformers_library().BertModel(_bert_settings(config), add_pooling_layer=False)
        self.head = nn.Linear(config.d_model, config.n_classes)
        self.n_positions = config.max_length * config.d_model
        """parameters of the table of positions"""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, C) for tokens (B, L), of which the first ``lengths`` (B,) count."""
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        x = self.net(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        logits: Tensor = self.head(x.masked_fill(~mask[:, :, None], 0.0).sum(1) / lengths[:, None])
        return logits


def _at(positions: Tensor, x: Tensor) -> Tensor:
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


def _shape(config: ModelConfig) -> dict[str, Any]:
    """Sizes under the names that most models of ``transformers`` have for them."""
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
