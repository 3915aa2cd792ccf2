"""A BERT of ``transformers`` as the peer of ``encoder.MaskedLM`` (Devlin et al., arXiv 1810.04805)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tnnlm.config import ModelConfig
from tnnlm.encoder import MaskedBatch
from tnnlm.errors import UserError

_HEAD = 64


class Bert(nn.Module):
    """Learned positions up to the training length, tied embeddings; ``glu_dim`` is the width of its MLP.

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


def bert_settings(config: ModelConfig) -> tuple[ModuleType, Any]:
    """The package, and a ``BertConfig`` of the sizes of one of our models.

    Raises:
        UserError: if ``transformers`` is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"needs the package transformers: pip install -c constraints.txt -e '.[peers]' ({error})"
        ) from None
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
