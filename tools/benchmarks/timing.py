"""Times of decoding steps and of prompts: subjects take turns in every round, medians are reported."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.subjects import Stepper, Subject, prompt_of
from experiments.timing import clock, interleaved, quartile_range, read_bandwidth

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
        the read bandwidth in GB/s (median over the cases), and rows: ``name``, ``dtype``, ``batch``,
        ``context``, ``seconds_per_token`` (of a step, median), ``tokens_per_second``, ``spread``
        (quartiles over the median), ``state_bytes`` per sequence, ``bandwidth_share``: weights and
        state read, over what the machine reads in that time.
    """
    bandwidths: list[float] = []
    rows: list[tuple[dict[str, Any], Subject]] = []
    for batch, context in cases:
        chosen = [
            subject
            for subject in subjects
            if context <= subject.longest and batch * subject.state_at(context) <= _STATE_BYTES
        ]
        about = f"reading {context} tokens, batch {batch}"
        reading = tqdm(enumerate(chosen), about, len(chosen), leave=False, disable=None)
        steps = {index: subject.step_at(batch, context) for index, subject in reading}
        bandwidths.append(read_bandwidth())
        times = interleaved(
            steps, effort.rounds, warm_up=0, settle=effort.settle, steps=effort.steps, clock=_clock
        )
        for index, subject in enumerate(chosen):
            own = row(subject.name, subject.dtype, batch, context, times[index])
            rows.append((own | {"state_bytes": subject.state_at(context)}, subject))
    bandwidth = statistics.median(bandwidths)
    for own, subject in rows:
        read = subject.weight_bytes + 2 * own["batch"] * own["state_bytes"]
        own["bandwidth_share"] = read / own["seconds_per_token"] / 1e9 / bandwidth
    return bandwidth, [own for own, _ in rows]


@torch.inference_mode()
def time_prefill(
    subjects: Sequence[Subject], lengths: Sequence[int], vocabulary: int, effort: Effort
) -> list[dict[str, Any]]:
    """Seconds per prompt token of every subject at every prompt length: rows as of :func:`time_steps`."""
    rows = []
    for length in tqdm(lengths, desc="prompts", leave=False, disable=None):
        prompt = prompt_of(length, vocabulary)
        chosen = [subject for subject in subjects if length <= subject.longest]
        cases = {index: partial(subject.prefill, prompt) for index, subject in enumerate(chosen)}
        times = interleaved(cases, max(2, effort.rounds // 2))
        rows += [
            row(subject.name, subject.dtype, 1, length, [seconds / length for seconds in times[index]])
            for index, subject in enumerate(chosen)
        ]
    return rows


def row(name: str, dtype: str, batch: int, context: int, seconds: list[float]) -> dict[str, Any]:
    """What every measurement of a model says; ``seconds`` are those of a step that gives ``batch`` tokens."""
    median = statistics.median(seconds)
    return {
        "name": name,
        "dtype": dtype,
        "batch": batch,
        "context": context,
        "seconds_per_token": median,
        "tokens_per_second": batch / median,
        "spread": quartile_range(seconds),
    }


def _clock(stepper: Stepper) -> float:
    """Seconds of a step; what takes it back is outside."""
    seconds = clock(stepper.step)
    stepper.undo()
    return seconds
