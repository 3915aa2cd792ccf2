"""Preparation of a folder of the cache by one process, for which all others wait.

Ranks that are started together wait here, on the data, before they meet: the meeting of a process group has a
timeout, and a preparation may take hours. With one cache per node, one rank per node prepares.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from tnnlm.data.prepared import is_prepared
from tnnlm.data.progress import reported
from tnnlm.errors import DataError
from tnnlm.files import only_process

POLL_SECONDS = 0.5
"""Seconds between two looks at a folder that another process prepares."""


def unfinished(folder: Path) -> Path:
    """Return the path of partial results of ``folder``, whose lock the process that prepares it holds."""
    return folder.with_name(f"{folder.name}.part")


def busy(folder: Path) -> DataError:
    """Return the error for a folder that another process prepares."""
    return DataError(
        f"{unfinished(folder)}: another process prepares the same data", "wait until it finishes"
    )


def prepare_once(folder: Path, build: Callable[[], None]) -> None:
    """Call ``build`` unless ``folder`` is prepared; while another process prepares it, wait.

    Args:
        folder: Folder of the cache, which is complete if and only if it contains
            :data:`~tnnlm.data.prepared.META`.
        build: Function that creates the folder.

    Raises:
        DataError: On a rank other than 0 if the process that it waited for ended without the data. Rank 0
            then calls ``build`` itself, so that it reports the reason. On every rank if
            the folder is damaged.
    """
    waited = False
    with ExitStack() as lines:
        while not is_prepared(folder):
            with ExitStack() as lock:
                refusal = busy(folder)
                try:
                    lock.enter_context(only_process(unfinished(folder), refusal))
                except DataError as error:
                    if error is not refusal:
                        raise
                    if not waited:
                        print(f"{error.reason}; waiting for it", file=sys.stderr)
                        lines.enter_context(reported(lambda: f"{folder}: waiting for another process"))
                    waited = True
                    time.sleep(POLL_SECONDS)
                    continue
                if is_prepared(folder):
                    return
                if waited and rank_zero_only.rank != 0:  # type: ignore[attr-defined]
                    raise DataError(
                        f"{folder}: the process that prepared this data has failed",
                        "correct what it reports, and start again",
                    )
                build()
                return
