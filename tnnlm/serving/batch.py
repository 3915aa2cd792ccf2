"""Running batch of sequences with their states; sequences join and leave between steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams
from tnnlm.models.causal_lm import ModelState
from tnnlm.serving.sampler import SequenceSampler, sample_batch
from tnnlm.serving.sequence import GeneratedSequence

REPRODUCIBLE_ROWS = 2
"""Minimum number of rows in a batch whose sequences have the same bits under any load.

A single row runs in the compiled step, or in another routine for matrix products, which round differently.
"""
IDLE_SHARE = 8
"""Rows per idle row: an idle row costs as much of a step as others."""
LEAST_PAUSE = 0.01
"""Seconds between two steps that prefill may always take."""


class StepOutput(NamedTuple):
    """Tokens and logits of one decoding step."""

    sequences: list[GeneratedSequence | None]
    """Sequence of each row; None for an idle row."""
    tokens: list[int | Exception]
    """Sampled token of each row, :data:`tnnlm.serving.sampler.NO_TOKEN`, or the exception of its sampling."""
    logits: Tensor
    """Logits that the tokens were sampled from, (B, V)."""
    seconds: float
    """Duration of the step in seconds, sampling included."""


class RunningBatch:
    """Running batch with constant memory per sequence, whatever its length."""

    def __init__(self, generator: TextGenerator, reproducible: bool = False) -> None:
        """Create an empty batch.

        Args:
            generator: Text generator with the model and its tokenizer.
            reproducible: Whether a single sequence gets an idle row; see :data:`REPRODUCIBLE_ROWS`.
        """
        self._least_rows = REPRODUCIBLE_ROWS if reproducible else 1
        self._model, self._device = generator.model, generator.device
        self._token_logits = generator.token_logits
        self._idle = SequenceSampler(SamplingParams(temperature=0), generator.tokenizer.size)
        self._sequences: list[GeneratedSequence | None] = []
        self._state: ModelState | None = None
        self._seconds = 0.0

    @property
    def pause(self) -> float:
        """Seconds that prefill may take before the next step.

        It is half of the last step, so that prompts of others don't double the time between tokens.
        """
        return max(LEAST_PAUSE, self._seconds / 2)

    @property
    def sequences(self) -> list[GeneratedSequence]:
        """Sequences in the batch, without idle rows."""
        return [sequence for sequence in self._sequences if sequence is not None]

    def step(self) -> StepOutput:
        """Process the last token of each row and sample the next one."""
        assert self._state is not None
        started = time.perf_counter()
        last = torch.tensor([sequence.drawn[-1] if sequence else 0 for sequence in self._sequences])
        logits, self._state = self._model.step_in_place(last.to(self._device), self._state)
        logits = self._token_logits(logits)
        tokens = sample_batch(
            logits, [sequence.sampler if sequence else self._idle for sequence in self._sequences]
        )
        self._seconds = time.perf_counter() - started
        return StepOutput(list(self._sequences), tokens, logits, self._seconds)

    def state_of(self, row: int) -> ModelState:
        """Return a copy of the state of a row."""
        assert self._state is not None
        return self._state.select(torch.tensor([row], device=self._device))

    def change(
        self,
        leave: Sequence[GeneratedSequence] = (),
        join: Sequence[tuple[GeneratedSequence, ModelState]] = (),
        expected: int = 0,
    ) -> None:
        """Remove sequences from the batch, and add sequences with their single-row states.

        The rows of sequences that leave become idle until others take them, because removing a row copies the
        states of all others, which takes as long as a step. After an exception the batch is as before.

        Args:
            leave: Sequences of the batch.
            join: Sequences and their states.
            expected: Number of sequences that are about to join, for which idle rows are kept.
        """
        if not leave and not join:
            return
        gone = {*leave}
        sequences = [None if sequence in gone else sequence for sequence in self._sequences]
        free = [row for row, sequence in enumerate(sequences) if sequence is None]
        kept = min(expected, len(sequences) // IDLE_SHARE)
        if 0 <= len(free) - len(join) <= kept + len(sequences) // IDLE_SHARE:
            for row, (sequence, state) in zip(free, join, strict=False):
                self._overwrite(row, state)
                sequences[row] = sequence
            self._sequences = sequences
        else:
            self._rebuild([row for row, sequence in enumerate(sequences) if sequence], join, expected)

    def _overwrite(self, row: int, state: ModelState) -> None:
        assert self._state is not None
        for own, new in zip(self._state.tensors, state.tensors, strict=True):
            own[row].copy_(new[0])

    def _rebuild(
        self, kept: Sequence[int], join: Sequence[tuple[GeneratedSequence, ModelState]], expected: int
    ) -> None:
        """Copy the states of the rows to keep and of new sequences into a batch, with few idle rows."""
        sequences = [self._sequences[row] for row in kept] + [sequence for sequence, _ in join]
        states = [state for _, state in join]
        if kept:
            assert self._state is not None
            states.insert(0, self._state.select(torch.tensor(kept, device=self._device)))
        if sequences:
            idle = max(min(expected, len(sequences) // IDLE_SHARE), self._least_rows - len(sequences))
            if idle > 0:
                sequences += [None] * idle
                states.append(self._model.init_state(idle))
        self._sequences, self._state = sequences, ModelState.join(states) if states else None

    def clear(self) -> None:
        """Remove all sequences, without any operation on their states."""
        self._sequences, self._state = [], None
