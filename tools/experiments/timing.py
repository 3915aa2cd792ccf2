"""Fair times: cases take turns, so that what else the machine does hits all alike; and peaks of memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

Run = Callable[[], Any]
Case = TypeVar("Case", bound=Hashable)
_READ_BYTES = 1 << 28


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


def quartile_range(seconds: list[float]) -> float:
    """Distance of the quartiles, over the median."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / median


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


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
