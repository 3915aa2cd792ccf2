"""Initialisation of DataLoader worker processes.

A separate module without heavy imports: each spawned worker imports it, and importing Lightning would take
three times as long as everything else.
"""

from __future__ import annotations

import signal


def leave_signals(worker: int) -> None:
    """Ignore SIGINT, SIGTERM, SIGHUP and SIGUSR1 in a DataLoader worker.

    Ctrl-C and a cluster's signals reach workers as well, but only the trainer process handles them.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
