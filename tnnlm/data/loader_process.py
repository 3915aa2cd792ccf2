"""What a loader process runs besides the rows: where processes are spawned each imports the module, and
Lightning would take it three times as long as all else."""

from __future__ import annotations

import signal


def leave_signals(worker: int) -> None:
    """In a loader process: Ctrl-C and a cluster's signals reach it too, but stopping is the trainer's."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
