"""The language model: a backbone with a tied head. Not a LightningModule.

``forward`` trains; ``prefill`` and ``step`` decode after conversion. The three share every
projection, so decoding can't drift from training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnnlm.config.schema import ModelConfig
from tnnlm.errors import ConfigError
from tnnlm.models.backbone import Backbone
from tnnlm.modules import LongConv, RecurrentConv
from tnnlm.ops.recurrence import State

LOGITS = 4096
"""tokens whose logits are held at a time where activations are recomputed"""


class ModelState(NamedTuple):
    """What is carried between tokens: one convolution state per layer."""

    layers: tuple[State, ...]

    def select(self, rows: Tensor) -> ModelState:
        """The states of some rows of the batch, by index (R,); a row may come up more than once."""
        chosen = (type(layer)(*(part.index_select(0, rows) for part in layer)) for layer in self.layers)
        return ModelState(tuple(chosen))

    @classmethod
    def join(cls, states: Sequence[ModelState]) -> ModelState:
        """Rows of several states of one model as one batch."""
        layers = (
            type(parts[0])(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
            for parts in zip(*(state.layers for state in states), strict=True)
        )
        return cls(tuple(layers))


def state_bytes(state: ModelState) -> int:
    """Bytes of a state, of all its rows together."""
    return sum(part.numel() * part.element_size() for layer in state.layers for part in layer)


class CausalLM(Backbone):
    """A Toeplitz neural network language model (arXiv 2305.04749), prenorm, tied embeddings.

    Training rows are packed: an eos stands between documents, and the convolution reads across it.
    """

    def __init__(self, config: ModelConfig, convs: Sequence[LongConv | RecurrentConv] | None = None) -> None:
        """Build it; ``convs``, one per layer, take the place of the kernels that ``config`` names.

        Raises:
            ConfigError: if ``config.causal`` is False.
        """
        if config.causal is False:
            raise ConfigError(
                "model.causal=false: a causal language model may see no later token",
                "leave model.causal out, or set task=masked",
            )
        super().__init__(config, convs)
        self.head: nn.Module | None = None
        """in the place of the tied embedding, for decoding"""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) for tokens (B, L), all positions at once."""
        return self._head(self.features(tokens))

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of rows of token ids (B, L + 1)."""
        features, targets = self.features(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        if not self.recompute:
            return nn.functional.cross_entropy(self._head(features).float(), targets)
        # All logits together would be the largest tensor of all.
        pieces = zip(features.split(LOGITS), targets.split(LOGITS), strict=True)
        total = sum(checkpoint(self._nll, *piece, use_reentrant=False) for piece in pieces)
        return total / len(targets)

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token.

        Raises:
            CheckpointError: if the model is not converted.
        """
        return ModelState(tuple(block.mixer.conv.init_state(batch_size) for block in self.layers))

    def prefill(
        self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, ModelState]:
        """Read tokens (B, L) in parallel, on top of ``state``.

        Args:
            tokens: (B, L); rows shorter than L are padded at their end.
            state: from :meth:`init_state`, or warm.
            lengths: (B,) tokens per row; None means L each. Logits at pads mean nothing.
            keep: compute logits for each row's last ``keep`` tokens only; None means all positions.

        Returns:
            logits (B, keep or L, V) and the state after each row's last token.

        Raises:
            CheckpointError: if the model is not converted.
        """
        x, state = self.read(tokens, state, lengths)
        return self.logits(x if keep is None else _last(x, keep, lengths)), state

    def read(
        self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """As :meth:`prefill`, without the head: what :meth:`logits` reads, (B, L, D), and the state."""
        x = self._embed(tokens)
        states = []
        for block, layer in zip(self.layers, state.layers, strict=True):
            x, layer = block.prefill(x, layer, lengths)
            states.append(layer)
        return x, ModelState(tuple(states))

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, K, V) at some of the positions that :meth:`read` returned, (B, K, D)."""
        return self._head(self.norm(x))

    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Read one token per row (B,): logits (B, V) and the next state, at constant cost.

        Rows where ``active`` (B,) is False keep their state.

        Raises:
            CheckpointError: if the model is not converted.
        """
        x = self._embed(tokens)
        states = []
        for block, layer in zip(self.layers, state.layers, strict=True):
            x, layer = block.step(x, layer, active)
            states.append(layer)
        return self._head(self.norm(x)), ModelState(tuple(states))

    def _nll(self, features: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self._head(features).float(), targets, reduction="sum")

    def _head(self, x: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x)
        return torch.nn.functional.linear(x, self.embedding.weight)


def _last(x: Tensor, keep: int, lengths: Tensor | None) -> Tensor:
    """The last ``keep`` positions of every row of (B, L, D), which end after ``lengths``."""
    if lengths is None:
        return x[:, -keep:]
    index = lengths.to(x.device)[:, None] + torch.arange(-keep, 0, device=x.device)
    return x.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[2]))
