"""Log of the server with a limited number of lines per kind, so that no client can fill it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tnnlm.errors import one_line

LINES = 10
"""Number of lines of one kind that are written within :data:`SECONDS`."""
SECONDS = 60.0
"""Length of the interval in seconds."""
_KIND = 30


class EventLog:
    """Log that writes at most ``lines`` lines of each kind within ``seconds``, from any thread.

    The first line of a kind in a later interval tells how many were omitted.
    """

    def __init__(
        self,
        lines: int = LINES,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a log whose intervals are measured in seconds of ``clock``."""
        self._logger = logging.getLogger("tnnlm.serving")
        self._lines, self._seconds, self._clock = lines, seconds, clock
        self._lock = threading.Lock()
        self._kinds: dict[str, tuple[float, int]] = {}

    def warn(self, kind: str, text: str) -> None:
        """Write a line of a kind, unless too many of its kind were written."""
        omitted = self.admit(kind)
        if omitted is not None:
            more = f" ({omitted} similar lines omitted)" if omitted else ""
            self._logger.warning("%s: %s%s", kind, text, more)

    def failed(self, what: str, error: Exception) -> None:
        """Write the line about an exception that ended ``what``, with the place that raised it."""
        self.warn("failed", f"{what}: {one_line(error)}{_place(error)}")

    def admit(self, kind: str) -> int | None:
        """Count a line; return None if it must be omitted, else the number omitted before it."""
        now = self._clock()
        with self._lock:
            began, count = self._kinds.get(kind, (now, 0))
            omitted = 0
            if now - began > self._seconds:
                omitted, began, count = max(0, count - self._lines), now, 0
            self._kinds[kind] = began, count + 1
            return omitted if count < self._lines else None


class LimitLines(logging.Filter):
    """Filter that limits the lines of another logger by the beginning of their message.

    The beginning is taken before arguments are inserted.
    """

    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        return self._log.admit(str(record.msg)[:_KIND]) is not None


def _place(error: Exception) -> str:
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
