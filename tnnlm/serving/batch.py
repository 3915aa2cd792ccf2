"""The rows of a running batch: texts with their states, which join and leave between any two steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import Sampling
from tnnlm.models.causal_lm import ModelState
from tnnlm.serving.sampler import RowSampler, draw
from tnnlm.serving.sequence import Job

LEAST_ROWS = 2
"""one row alone takes another routine of the matrix products, which rounds differently: with an idle row
beside it the packed engine gives a text the same bits under any load"""


class Drawn(NamedTuple):
    """What a step gave."""

    jobs: list[Job | None]
    """by row; None is an idle one"""
    tokens: list[int]
    logits: Tensor
    """(B, V)"""
    seconds: float


class Rows:
    """Fixed memory per row, whatever it has read."""

    def __init__(self, generator: TextGenerator) -> None:
        self._model, self._device = generator.model, generator.device
        self._vocabulary = generator.tokenizer.size
        self._idle = RowSampler(Sampling(temperature=0), self._vocabulary)
        self._jobs: list[Job | None] = []
        self._state: ModelState | None = None

    @property
    def jobs(self) -> list[Job]:
        """The texts in it."""
        return [job for job in self._jobs if job is not None]

    def step(self) -> Drawn:
        """Feed every row its last token, and draw its next."""
        assert self._state is not None
        started = time.perf_counter()
        last = torch.tensor([job.drawn[-1] if job else 0 for job in self._jobs])
        logits, self._state = self._model.step(last.to(self._device), self._state)
        logits = logits[:, : self._vocabulary]
        tokens = draw(logits, [job.sampler if job else self._idle for job in self._jobs])
        return Drawn(list(self._jobs), tokens, logits, time.perf_counter() - started)

    def change(self, leave: Sequence[Job] = (), join: Sequence[tuple[Job, ModelState]] = ()) -> None:
        """Take texts out, and in, each with its state of one row."""
        if not leave and not join:
            return
        kept = [row for row, job in enumerate(self._jobs) if job is not None and job not in leave]
        jobs = [self._jobs[row] for row in kept] + [job for job, _ in join]
        states = [state for _, state in join]
        if kept:
            assert self._state is not None
            states.insert(0, self._state.select(torch.tensor(kept, device=self._device)))
        idle = LEAST_ROWS - len(jobs) if jobs else 0
        if idle > 0:
            jobs += [None] * idle
            states.append(self._model.init_state(idle))
        self._jobs, self._state = jobs, ModelState.join(states) if states else None

    def clear(self) -> None:
        """Take all out."""
        self._jobs, self._state = [], None
