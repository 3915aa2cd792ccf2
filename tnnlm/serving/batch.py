"""The running batch: sequences with their states, which join and leave between any two steps."""

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

LEAST_ROWS = 2
"""one row alone takes another routine of the matrix products, which rounds differently: with an idle row
next to it the packed engine gives a sequence the same bits under any load"""


class StepOutput(NamedTuple):
    """Tokens of one step."""

    sequences: list[GeneratedSequence | None]
    """by row; None is an idle one"""
    tokens: list[int]
    logits: Tensor
    """(B, V)"""
    seconds: float


class RunningBatch:
    """Fixed memory per sequence, however long it is."""

    def __init__(self, generator: TextGenerator) -> None:
        self._model, self._device = generator.model, generator.device
        self._vocabulary = generator.tokenizer.size
        self._idle = SequenceSampler(SamplingParams(temperature=0), self._vocabulary)
        self._sequences: list[GeneratedSequence | None] = []
        self._state: ModelState | None = None

    @property
    def sequences(self) -> list[GeneratedSequence]:
        """The sequences in it."""
        return [sequence for sequence in self._sequences if sequence is not None]

    def step(self) -> StepOutput:
        """Feed every row its last token, and draw its next."""
        assert self._state is not None
        started = time.perf_counter()
        last = torch.tensor([sequence.drawn[-1] if sequence else 0 for sequence in self._sequences])
        logits, self._state = self._model.step(last.to(self._device), self._state)
        logits = logits[:, : self._vocabulary]
        tokens = sample_batch(
            logits, [sequence.sampler if sequence else self._idle for sequence in self._sequences]
        )
        return StepOutput(list(self._sequences), tokens, logits, time.perf_counter() - started)

    def change(
        self,
        leave: Sequence[GeneratedSequence] = (),
        join: Sequence[tuple[GeneratedSequence, ModelState]] = (),
    ) -> None:
        """Take sequences out, and in, each with its state of one row."""
        if not leave and not join:
            return
        stays = {*self.sequences} - {*leave}
        kept = [row for row, sequence in enumerate(self._sequences) if sequence in stays]
        sequences = [self._sequences[row] for row in kept] + [sequence for sequence, _ in join]
        states = [state for _, state in join]
        if kept:
            assert self._state is not None
            states.insert(0, self._state.select(torch.tensor(kept, device=self._device)))
        idle = LEAST_ROWS - len(sequences) if sequences else 0
        if idle > 0:
            sequences += [None] * idle
            states.append(self._model.init_state(idle))
        self._sequences, self._state = sequences, ModelState.join(states) if states else None
