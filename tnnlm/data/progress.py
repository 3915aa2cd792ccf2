"""Progress of long reads: a bar at a terminal, and a line every half minute in a file or pipe."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Seconds between two lines, and before the first."""


class _Bar(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no thread, which would make forking a loader process unsafe


class _Lines(io.StringIO):
    """Stream that prints each state of a bar as a line on stderr, in place of overwriting the last one."""

    def write(self, text: str) -> int:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


def progress(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return ``items`` as a tqdm bar, which prints plain lines where stderr is no terminal.

    Args:
        items: Items to iterate over; None for a bar that the caller updates.
        **options: Options of tqdm, such as ``desc``, ``total`` and ``unit``.
    """
    options = {"unit_scale": True, **options}
    if not at_terminal():
        options |= {"file": _Lines(), "ascii": True, "ncols": 100, "leave": False, "miniters": 1}
        options |= {"delay": SECONDS, "mininterval": SECONDS}
    return _Bar(items, **options)


def at_terminal() -> bool:
    """Return whether stderr is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def reported(status: Callable[[], str]) -> Iterator[None]:
    """Print a line with ``status`` and the seconds so far, every half minute until the block ends.

    For work inside a library that reports no progress to a file or pipe.
    """
    began, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(SECONDS):
            print(f"{status()}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
