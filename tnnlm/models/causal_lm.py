"""Causal language model: a backbone with a tied head. It is not a LightningModule.

``forward`` is for training; ``prefill`` and ``step`` decode after conversion. All three use the same
projections, so that decoding can't drift from training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnnlm.config.schema import ModelConfig
from tnnlm.errors import ConfigError
from tnnlm.models.backbone import Backbone
from tnnlm.modules import LongConv, RecurrentConv
from tnnlm.ops.cross_entropy import linear_cross_entropy
from tnnlm.ops.recurrence import State, named_tensors, with_tensors


class ModelState(NamedTuple):
    """Decoding state of the model, which has a fixed size."""

    layers: tuple[State, ...]
    """States of the convolutions of all layers, in order: one per layer, two with the block ``hyena``."""

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors of all layers, in order."""
        return [part for layer in self.layers for part in named_tensors(layer).values()]

    def select(self, rows: Tensor) -> ModelState:
        """Return the states of the batch rows with the given indices (R,); an index may be repeated."""
        return ModelState(
            tuple(
                with_tensors(
                    layer,
                    (
                        _in_order([part], lambda parts: parts[0].index_select(0, rows))
                        for part in named_tensors(layer).values()
                    ),
                )
                for layer in self.layers
            )
        )

    def copy(self) -> ModelState:
        """Return a copy, with the same order of memory."""
        return ModelState(
            tuple(
                with_tensors(layer, map(torch.clone, named_tensors(layer).values())) for layer in self.layers
            )
        )

    @classmethod
    def join(cls, states: Sequence[ModelState]) -> ModelState:
        """Concatenate states of the same model along the batch."""
        layers = []
        for parts in zip(*(state.layers for state in states), strict=True):
            tensors = zip(*(named_tensors(part).values() for part in parts), strict=True)
            layers.append(with_tensors(parts[0], (_in_order(rows, torch.cat) for rows in tensors)))
        return cls(tuple(layers))


def _in_order(parts: Sequence[Tensor], function: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Apply a function of rows to parts of a state, with a result in the order of memory of the parts.

    A step on a CPU returns parts (B, E, N) with channels last in memory.
    """
    if any(part.dim() == 3 and part.stride(2) > part.stride(1) for part in parts):
        return function([part.mT for part in parts]).mT
    return function([*parts])


def state_bytes(state: ModelState) -> int:
    """Return the size of a state in bytes, over all its rows."""
    return sum(part.numel() * part.element_size() for part in state.tensors)


class CausalLM(Backbone):
    """Causal Toeplitz neural network language model (arXiv 2305.04749), prenorm, with tied embeddings.

    Training rows are packed: documents are separated by an end-of-document token, and the convolution isn't
    reset at it.
    """

    def __init__(self, config: ModelConfig, convs: Sequence[LongConv | RecurrentConv] | None = None) -> None:
        """Build the model with the kernel of ``config``, or with ``convs``, one per layer, if given.

        Raises:
            ConfigError: If ``config.causal`` is False.
        """
        if config.causal is False:
            raise ConfigError(
                "model.causal=false: a causal language model must not see later tokens",
                "omit model.causal, or set task=masked",
            )
        super().__init__(config, convs)
        self.head: nn.Module | None = None
        """Output layer that replaces the tied embedding in decoding, if set."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, L, V) for tokens (B, L), all positions in parallel."""
        return self._head(self.features(tokens))

    def loss(self, rows: Tensor, mask: Tensor | None = None, divisor: float | None = None) -> Tensor:
        """Return the mean cross-entropy in nats per scored token.

        Args:
            rows: Token ids (B, L + 1), inputs and targets in one tensor.
            mask: Whether each target, ``rows[:, 1:]``, is scored, (B, L). The others have no loss and no
                gradient, and the head isn't computed for them. None scores all of them.
            divisor: Number that divides the summed loss of a batch with a mask; None divides by the number
                of its scored targets, or by 1 if there are none. See
                :attr:`~tnnlm.models.batches.AnswerBatch.divisor`.
        """
        features, targets = self.features(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        if mask is None:
            return linear_cross_entropy(features, self.embedding.weight, targets)
        scored = mask.flatten()
        by = scored.sum().clamp(min=1) if divisor is None else features.new_tensor(divisor)
        return linear_cross_entropy(features[scored], self.embedding.weight, targets[scored], by)

    def init_state(self, batch_size: int) -> ModelState:
        """Return the state before the first token.

        Raises:
            CheckpointError: If the model is not converted.
        """
        return ModelState(tuple(state for block in self.layers for state in block.init_state(batch_size)))

    def prefill(
        self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process tokens (B, L) in parallel, continuing from ``state``.

        Args:
            tokens: Token ids (B, L); rows shorter than L are padded at their end.
            state: State from :meth:`init_state` or after earlier tokens.
            lengths: Number of tokens per row, (B,); None means L each. Logits at padding are undefined.
            keep: Number of last tokens of each row to compute logits for; None means all positions, and with
                0 the head is not run.

        Returns:
            Logits (B, keep or L, V) and the state after the last token of each row.

        Raises:
            CheckpointError: If the model is not converted.
        """
        x, state = self.read(tokens, state, lengths)
        if keep == 0:
            return x.new_empty(len(x), 0, self.embedding.num_embeddings), state
        return self.logits(x if keep is None else _last(x, keep, lengths)), state

    def read(
        self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process tokens like :meth:`prefill`, without the head.

        Returns:
            Hidden states (B, L, D) for :meth:`logits`, and the state after the last token of each row.
        """
        x = self._embed(tokens)
        before, after = iter(state.layers), list[State]()
        for block in self.layers:
            x, states = block.prefill(x, tuple(islice(before, block.mixer.n_states)), lengths)
            after.extend(states)
        return x, ModelState(tuple(after))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of the hidden states (..., D) of :meth:`read` or :meth:`advance`."""
        return self._head(self.norm(x))

    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process one token per row (B,) and return logits (B, V) and the next state, at constant cost.

        Rows where ``active`` (B,) is False keep their state.

        Raises:
            CheckpointError: If the model is not converted.
        """
        x, state = self.advance(tokens, state, active)
        return self.logits(x), state

    def steps(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, list[ModelState]]:
        """Process K tokens per row (B, K) with one pass over the weights, and keep the state after each.

        It is the pass that checks proposed tokens (:mod:`tnnlm.inference.speculation`). The recurrences take
        K single steps; the linear layers see K times as many rows, so that their rounding may differ.

        Returns:
            Logits (B, K, V) and K states.

        Raises:
            CheckpointError: If the model is not converted.
        """
        x = self._embed(tokens)
        before = iter(state.layers)
        after: list[tuple[State, ...]] = [()] * tokens.shape[1]
        for block in self.layers:
            x, states = block.steps(x, tuple(islice(before, block.mixer.n_states)))
            after = [(*earlier, *layer) for earlier, layer in zip(after, states, strict=True)]
        return self.logits(x), [ModelState(layers) for layers in after]

    def step_in_place(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Process one token per row like :meth:`step`; ``state`` must not be used afterwards.

        Compiled models modify it, which saves memory traffic.
        """
        return self.step(tokens, state)

    def advance(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process one token per row (B,) like :meth:`step`, without the head.

        Returns:
            Hidden states (B, D) for :meth:`logits`, and the next state.
        """
        x = self._embed(tokens)
        before, after = iter(state.layers), list[State]()
        for block in self.layers:
            x, states = block.step(x, tuple(islice(before, block.mixer.n_states)), active)
            after.extend(states)
        return x, ModelState(tuple(after))

    def _head(self, x: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x)
        return torch.nn.functional.linear(x, self.embedding.weight)


def _last(x: Tensor, keep: int, lengths: Tensor | None) -> Tensor:
    """Return the last ``keep`` positions of each row of (B, L, D), where row b has ``lengths[b]`` tokens."""
    if lengths is None:
        return x[:, -keep:]
    index = lengths.to(x.device)[:, None] + torch.arange(-keep, 0, device=x.device)
    return x.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[2]))
