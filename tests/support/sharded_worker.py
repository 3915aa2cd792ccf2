"""Ranks of a sharded run in which the write of a checkpoint is killed or fails on a full disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.ranks import train_as_rank
from tnnlm.checksums import list_files


def train_until_save(fault: str, step: int, *arguments: Any) -> None:
    """Train as one rank, with a fault when the shards of ``step`` are on the disk and not yet described.

    Args:
        fault: ``kill`` ends each rank as a power failure would; ``full`` is a full disk on the last rank.
        step: Step of the checkpoint.
        arguments: Arguments of :func:`tests.support.ranks.train_as_rank`, of which the first is the rank and
            the second the number of ranks.
    """
    rank, ranks = arguments[:2]

    def faulty(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
        if folder.name == f"last-{step}.shards":
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == ranks - 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return list_files(folder, names)

    with patch("tnnlm.training.sharded_save.list_files", faulty):
        train_as_rank(*arguments)
