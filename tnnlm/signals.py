"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

HANGUP: int | None = getattr(signal, "SIGHUP", None)
"""Signal of a terminal that was closed; None on Windows, which lacks it."""


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP raise ``KeyboardInterrupt`` as Ctrl-C does, and record all in the yielded list.

    Temporary files and locks are thus removed. A signal that has another handler or is ignored, as SIGHUP is
    under nohup, is left alone. Does nothing outside the main thread.
    """
    noted: list[int] = []
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a child that was forked, which its parent ends
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        noted.append(number)
        if number == HANGUP:
            leave_closed_terminal()
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)  # a shell may repeat SIGHUP, which would end the clean-up
        signal.default_int_handler(number, frame)

    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if HANGUP is not None:
        defaults[HANGUP] = signal.SIG_DFL
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, found in defaults.items() if in_main and signal.getsignal(number) is found]
    for number in ours:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in ours:
            signal.signal(number, defaults[number])


def leave_closed_terminal() -> None:
    """Discard what is still printed if the terminal was closed, where printing would fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        try:
            os.get_terminal_size(descriptor)
        except OSError as error:
            if error.errno == errno.EIO:
                with suppress(OSError):
                    os.dup2(nowhere, descriptor)
    os.close(nowhere)
