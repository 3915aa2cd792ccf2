"""Interleaved timing, so that other load on the machine affects all cases alike, and peak memory.

Cases are calls without arguments, or decoding steps and prefills of models (``Subject``).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Run = Callable[[], Any]
Case = TypeVar("Case", bound=Hashable)
_READ_BYTES = 1 << 28
_STATE_BYTES = 1 << 31
"""Bytes of state above which a case is skipped, since the states of all subjects are held at once."""


def clock(run: Run) -> float:
    """Return the seconds of one call, including all GPU work."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def clock_mean(run: Run, seconds: float = 0.02) -> float:
    """Return the mean seconds of a call over at least ``seconds``, after one warm-up call."""
    run()
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < seconds:
        run()
        count += 1
    return (time.perf_counter() - started) / count


def interleaved(
    cases: Mapping[Case, Any],
    turns: int,
    *,
    warm_up: int = 1,
    settle: int = 0,
    steps: int = 1,
    clock: Callable[[Any], float] = clock,
) -> dict[Case, list[float]]:
    """Time all cases in every round, and return the seconds of each.

    Args:
        cases: Cases by name: arguments of ``clock``, by default calls without arguments.
        turns: Timed rounds.
        warm_up: Untimed rounds before them.
        settle: Untimed calls per case and round, which replace the data of other cases in the caches.
        steps: Timed calls per case and round.
        clock: Times one call.
    """
    seconds: dict[Case, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + turns):
        for name, run in cases.items():
            took = [clock(run) for _ in range(settle + steps)]
            seconds[name] += took[settle:] if turn >= warm_up else []
    return seconds


def medians(seconds: Mapping[Case, list[float]]) -> dict[Case, float]:
    """Return the median of every case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def read_bandwidth() -> float:
    """Return the memory read bandwidth of all threads in GB/s, the best of eight passes over 256 MiB."""
    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / min(clock(partial(torch.sum, data)) for _ in range(8)) / 1e9


def peak_allocated(run: Run) -> int:
    """Return the peak memory of a call in bytes beyond that before it, of the GPU if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from logging every start and stop
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as prof:
        run()
    held = peak = 0
    results = prof.profiler.kineto_results
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return int(peak)


class Stepper(NamedTuple):
    """A decoding step at a context, and the untimed call that undoes it."""

    step: Callable[[], Any]
    undo: Callable[[], None] | None


@dataclass
class Subject:
    """A model to time."""

    name: str
    dtype: str
    weight_bytes: int
    """Bytes of the linear layers and the head, which every decoding step reads."""
    step_at: Callable[[int, int], Stepper]
    """Return a decoding step for a batch size and a context."""
    prefill: Callable[[Tensor], Any]
    """Prefill a prompt (1, L) from an empty state."""
    state_at: Callable[[int], int]
    """Return the bytes of state per sequence at a context."""
    longest: int = 1 << 20
    """Longest context, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Numbers of repetitions."""

    rounds: int = 8
    settle: int = 6
    """Untimed steps per round, which replace the data of other cases in the caches."""
    steps: int = 6
    """Timed steps per round."""


QUICK = Effort(rounds=3, settle=3, steps=4)


@torch.inference_mode()
def time_steps(
    subjects: Sequence[Subject], cases: Sequence[tuple[int, int]], effort: Effort
) -> tuple[float, list[dict[str, Any]]]:
    """Time the decoding steps of every subject in every case.

    Args:
        subjects: Models to time.
        cases: Pairs (batch, context).
        effort: Numbers of repetitions.

    Returns:
        Read bandwidth in GB/s (median over the cases), and rows: ``name``, ``dtype``, ``batch``,
        ``context``, ``seconds_per_token`` (median of a step), ``tokens_per_second``, ``spread``
        (interquartile range over the median), ``state_bytes`` per sequence, ``bandwidth_share``: traffic of
        weights and state as a fraction of the read bandwidth.
    """
    from tqdm import tqdm  # not at the top: tools/gpu_check.py runs where only torch is installed

    bandwidths: list[float] = []
    rows: list[tuple[dict[str, Any], Subject]] = []
    for batch, context in cases:
        chosen = [
            subject
            for subject in subjects
            if context <= subject.longest and batch * subject.state_at(context) <= _STATE_BYTES
        ]
        about = f"prefilling {context} tokens, batch {batch}"
        prefilled = tqdm(enumerate(chosen), about, len(chosen), leave=False, disable=None)
        steps = {index: subject.step_at(batch, context) for index, subject in prefilled}
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
    """Time the prefill of every subject at every prompt length, per token; rows as in :func:`time_steps`."""
    from tqdm import tqdm

    rows = []
    for length in tqdm(lengths, desc="prompts", leave=False, disable=None):
        prompt = random_tokens(1, length, vocabulary)
        chosen = [subject for subject in subjects if length <= subject.longest]
        cases = {index: partial(subject.prefill, prompt) for index, subject in enumerate(chosen)}
        times = interleaved(cases, max(2, effort.rounds // 2))
        rows += [
            row(subject.name, subject.dtype, 1, length, [seconds / length for seconds in times[index]])
            for index, subject in enumerate(chosen)
        ]
    return rows


def row(name: str, dtype: str, batch: int, context: int, seconds: list[float]) -> dict[str, Any]:
    """Summarise the times of one case; ``seconds`` are those of a step, which generates ``batch`` tokens."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "name": name,
        "dtype": dtype,
        "batch": batch,
        "context": context,
        "seconds_per_token": median,
        "tokens_per_second": batch / median,
        "spread": (high - low) / median,
    }


def _clock(stepper: Stepper) -> float:
    """Return the seconds of a step, without those of undoing it."""
    seconds = clock(stepper.step)
    if stepper.undo:
        stepper.undo()
    return seconds


def random_tokens(rows: int, length: int, vocabulary: int) -> Tensor:
    """Return random token ids (``rows``, ``length``), the same for the same arguments."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
