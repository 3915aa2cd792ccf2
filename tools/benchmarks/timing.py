"""Fair times: subjects take turns in every round, warm-up left out, medians and quartiles reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.subjects import Subject, prompt_of

_READ_BYTES = 1 << 28
_STATE_BYTES = 1 << 31
"""a case whose state is larger is left out: all subjects' states are held side by side"""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How often everything is repeated."""

    rounds: int = 8
    settle: int = 6
    """untimed steps per turn: what the turn before left in the caches goes"""
    steps: int = 6
    """timed ones"""


QUICK = Effort(rounds=3, settle=3, steps=4)


def read_bandwidth() -> float:
    """GB/s at which all threads together read memory, the best of several passes over 256 MiB."""
    data = torch.ones(_READ_BYTES // 4)
    best = min(_clock(lambda: data.sum()) for _ in range(8))
    return _READ_BYTES / best / 1e9


@torch.inference_mode()
def time_steps(
    subjects: Sequence[Subject], cases: Sequence[tuple[int, int]], effort: Effort
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds per step of every subject in every case.

    Args:
        subjects: what is timed.
        cases: (batch, context).
        effort: how often.

    Returns:
        the read bandwidth in GB/s (median over the rounds), and rows: ``name``, ``dtype``, ``batch``,
        ``context``, ``seconds_per_token`` (of a step, median), ``tokens_per_second``, ``spread``
        (quartiles over the median), ``state_bytes`` per sequence, ``bandwidth_share``: weights and
        state read, over what the machine reads in that time.
    """
    bandwidths, rows = [], []
    for batch, context in cases:
        chosen = [
            subject
            for subject in subjects
            if context <= subject.longest and batch * subject.state_at(context) <= _STATE_BYTES
        ]
        steps = []
        for subject in tqdm(
            chosen, desc=f"reading {context} tokens, batch {batch}", leave=False, disable=None
        ):
            steps.append(subject.step_at(batch, context))
        times: list[list[float]] = [[] for _ in chosen]
        for _ in tqdm(
            range(effort.rounds), desc=f"context {context}, batch {batch}", leave=False, disable=None
        ):
            bandwidths.append(read_bandwidth())
            for stepper, seconds in zip(steps, times, strict=True):
                for index in range(effort.settle + effort.steps):
                    took = _clock(stepper.step)
                    stepper.undo()
                    if index >= effort.settle:
                        seconds.append(took)
        for subject, seconds in zip(chosen, times, strict=True):
            rows.append(_row(subject, batch, context, seconds) | {"state_bytes": subject.state_at(context)})
    bandwidth = statistics.median(bandwidths)
    for row, subject in ((row, _named(subjects, row)) for row in rows):
        read = subject.weight_bytes + 2 * row["batch"] * row["state_bytes"]
        row["bandwidth_share"] = read / row["seconds_per_token"] / 1e9 / bandwidth
    return bandwidth, rows


@torch.inference_mode()
def time_prefill(
    subjects: Sequence[Subject], lengths: Sequence[int], vocabulary: int, effort: Effort
) -> list[dict[str, Any]]:
    """Seconds per prompt token of every subject at every prompt length: rows as of :func:`time_steps`."""
    rows = []
    for length in lengths:
        prompt = prompt_of(length, vocabulary)
        chosen = [subject for subject in subjects if length <= subject.longest]
        times: list[list[float]] = [[] for _ in chosen]
        rounds = range(1 + max(2, effort.rounds // 2))
        for index in tqdm(rounds, desc=f"prompt of {length}", leave=False, disable=None):
            for subject, seconds in zip(chosen, times, strict=True):
                took = _clock(partial(subject.prefill, prompt)) / length
                if index:
                    seconds.append(took)
        rows += [_row(s, 1, length, seconds) for s, seconds in zip(chosen, times, strict=True)]
    return rows


def _row(subject: Subject, batch: int, context: int, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "name": subject.name,
        "dtype": subject.dtype,
        "batch": batch,
        "context": context,
        "seconds_per_token": median,
        "tokens_per_second": batch / median,
        "spread": quartile_range(seconds),
    }


def quartile_range(seconds: list[float]) -> float:
    """Distance of the quartiles, over the median."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / median


def _named(subjects: Sequence[Subject], row: dict[str, Any]) -> Subject:
    return next(s for s in subjects if (s.name, s.dtype) == (row["name"], row["dtype"]))


def _clock(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
