"""Models that read a text as a whole, masked language model and classifier; and the model of each task.

Two-sided unless ``config.causal`` says otherwise. They have no recurrent form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.config.schema import ModelConfig
from tnnlm.models.backbone import Backbone
from tnnlm.models.batches import LabelledBatch, MaskedBatch


class MaskedLM(Backbone):
    """Guesses hidden tokens from both sides (Devlin et al., arXiv 1810.04805); tied embeddings, no bias."""

    causal_by_default = False

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) for tokens (B, L); or (B, M, V) at ``positions`` (B, M) alone, which costs less.

        ``mask``: as for :meth:`tnnlm.models.backbone.Backbone.features`.
        """
        x = self.features(tokens, mask)
        if positions is not None:
            x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))
        return nn.functional.linear(x, self.embedding.weight)

    def loss(self, batch: MaskedBatch) -> Tensor:
        """Mean cross-entropy in nats per token to be guessed."""
        logits = self(batch.tokens, batch.positions)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


class SequenceClassifier(Backbone):
    """Classes of whole sequences: a linear layer on the mean of the features, pads left out.

    Of pairs, where ``config.pair``: on [a, b, a * b, a - b] of the two means (arXiv 2011.04006).
    """

    causal_by_default = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear((4 if config.pair else 1) * config.d_model, config.n_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, C) for tokens (B, L), of which the first ``lengths`` (B,) count; None: all of them.

        Of pairs: tokens (B, 2, L) and lengths (B, 2).
        """
        if not self.config.pair:
            return self.head(self.pooled(tokens, lengths))
        flat = None if lengths is None else lengths.flatten()
        a, b = self.pooled(tokens.flatten(0, 1), flat).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat((a, b, a * b, a - b), dim=-1))

    def pooled(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean of the features (B, D) of tokens (B, L), over the first ``lengths`` (B,) or all."""
        if lengths is None:
            return self.features(tokens).mean(1)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        total = self.features(tokens, mask).masked_fill(~mask[:, :, None], 0.0).sum(1)
        return total / lengths[:, None]

    def loss(self, batch: LabelledBatch) -> Tensor:
        """Mean cross-entropy in nats per sequence."""
        return nn.functional.cross_entropy(self(batch.tokens, batch.lengths).float(), batch.labels)
