"""Masked language model and sequence classifier, which are bidirectional unless ``config.causal`` is true.

They have no recurrent form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.config.schema import ModelConfig
from tnnlm.models.backbone import Backbone
from tnnlm.models.batches import LabelledBatch, MaskedBatch
from tnnlm.ops.cross_entropy import linear_cross_entropy


class MaskedLM(Backbone):
    """Masked language model (as BERT, arXiv 1810.04805) with tied embeddings and no output bias."""

    causal_by_default = False

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, L, V) for tokens (B, L), or (B, M, V) at ``positions`` (B, M) only.

        Tokens where ``mask`` (B, L) is False are padding; see
        :meth:`tnnlm.models.backbone.Backbone.features`.
        """
        return nn.functional.linear(self._hidden(tokens, positions, mask), self.embedding.weight)

    def loss(self, batch: MaskedBatch) -> Tensor:
        """Return the mean cross-entropy in nats per predicted token."""
        x = self._hidden(batch.tokens, batch.positions)
        return linear_cross_entropy(x.flatten(0, 1), self.embedding.weight, batch.targets.flatten())

    def _hidden(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None = None) -> Tensor:
        x = self.features(tokens, mask)
        return x if positions is None else x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


class SequenceClassifier(Backbone):
    """Sequence classifier: a linear layer on the mean of the hidden states, excluding padding.

    If ``config.pair`` is true, the linear layer takes [a, b, a * b, a - b], where a and b are the means of
    the two sequences (arXiv 2011.04006).
    """

    causal_by_default = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear((4 if config.pair else 1) * config.d_model, config.n_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the class logits (B, C) for tokens (B, L), of which row b has ``lengths[b]`` (None: all L).

        For pairs, tokens are (B, 2, L) and lengths (B, 2).
        """
        if not self.config.pair:
            return self.head(self.pooled(tokens, lengths))
        flat = None if lengths is None else lengths.flatten()
        a, b = self.pooled(tokens.flatten(0, 1), flat).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat((a, b, a * b, a - b), dim=-1))

    def pooled(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the mean hidden state (B, D) of tokens (B, L), over the first ``lengths[b]`` or all."""
        if lengths is None:
            return self.features(tokens).mean(1)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        total = self.features(tokens, mask).masked_fill(~mask[:, :, None], 0.0).sum(1)
        return total / lengths[:, None]

    def loss(self, batch: LabelledBatch) -> Tensor:
        """Return the mean cross-entropy in nats per sequence."""
        return nn.functional.cross_entropy(self(batch.tokens, batch.lengths).float(), batch.labels)
