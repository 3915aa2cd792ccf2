"""Fair times: cases take turns, so that what else the machine does hits all alike; and peaks of memory.

Of calls without arguments, and of decoding steps and prompts of any model, a ``Subject``.
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
from tqdm import tqdm

Run = Callable[[], Any]
Case = TypeVar("Case", bound=Hashable)
_READ_BYTES = 1 << 28
_STATE_BYTES = 1 << 31
"""a case whose state is larger is left out: all subjects' states are held side by side"""


def clock(run: Run) -> float:
    """Seconds of one call, on a GPU until it is done."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def clock_mean(run: Run, seconds: float = 0.02) -> float:
    """Seconds of a call, the mean of as many as fill so many seconds; one before them fills the caches."""
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
    """Seconds of every case: all cases in each turn.

    Args:
        cases: what is timed, by name: what ``clock`` takes, calls without arguments unless it is given.
        turns: that count.
        warm_up: turns before them.
        settle: calls before those that count in a turn, so that what other cases left in the caches goes.
        steps: calls that count in a turn.
        clock: times one call.
    """
    seconds: dict[Case, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + turns):
        for name, run in cases.items():
            took = [clock(run) for _ in range(settle + steps)]
            seconds[name] += took[settle:] if turn >= warm_up else []
    return seconds


def medians(seconds: Mapping[Case, list[float]]) -> dict[Case, float]:
    """The median of every case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def read_bandwidth() -> float:
    """GB/s at which all threads together read memory, the best of several passes over 256 MiB."""
    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / min(clock(partial(torch.sum, data)) for _ in range(8)) / 1e9


def peak_allocated(run: Run) -> int:
    """Bytes that a call holds at its peak beyond what was there before: on a GPU if it has used one."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop
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
    """One more token per row at a context, and what takes it back, outside the clock."""

    step: Callable[[], Any]
    undo: Callable[[], None] | None


@dataclass
class Subject:
    """One model as it is timed."""

    name: str
    dtype: str
    weight_bytes: int
    """of linear layers and head, read for each token of one row"""
    step_at: Callable[[int, int], Stepper]
    """(batch, context) -> a step at that context"""
    prefill: Callable[[Tensor], Any]
    """reads a prompt (1, L) from an empty state"""
    state_at: Callable[[int], int]
    """context -> bytes of state per sequence"""
    longest: int = 1 << 20
    """context that it can be asked for"""


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
    """What every measurement of a model says; ``seconds`` are those of a step that gives ``batch`` tokens."""
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
    """Seconds of a step; what takes it back is outside."""
    seconds = clock(stepper.step)
    if stepper.undo:
        stepper.undo()
    return seconds


def random_tokens(rows: int, length: int, vocabulary: int) -> Tensor:
    """Token ids (``rows``, ``length``), the same ones for the same numbers."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
