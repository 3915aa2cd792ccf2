"""Runner of parts: each is a process with a time limit, so that a crash or a hang loses one part only.

Parts append rows to files while they measure. A part that crashes, hangs or is stopped keeps its rows. This
module needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from gpu_checks.rows import Row, read_rows

LEAST = 10.0
"""Seconds below which no further part is started."""
_POLL = 0.2
_STATUS = "status"
"""Kind of the row with which a part states why it has not measured."""
SKIPPED = "skipped: needs the package "
"""Beginning of the status of a part whose package is missing."""
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Part(NamedTuple):
    """Measurement that runs in a separate process."""

    name: str
    function: str
    """Module and function, ``MODULE:FUNCTION``."""
    seconds: float
    """Longest time that it may take."""


@dataclass
class Outcome:
    """Result of a part."""

    part: str
    status: str
    """Status: ``measured``, or ``skipped``, ``failed``, ``stopped`` or ``not started`` with the reason."""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


Launch = Callable[[Part, Path, float], Sequence[str]]
"""Function (part, file of its rows, seconds) that returns the command of its process."""


class StopSignals:
    """Signals that end the run early; the results so far are kept."""

    def __init__(self) -> None:
        self.name = ""
        """Name of the first signal, empty until there is one."""
        self.number = 0

    def listen(self) -> None:
        """Note the signals that ask this process to end, from now on, instead of ending it.

        SIGHUP is among them: the connection to a rented machine may break, and the processes of the parts
        would continue to use the GPU.
        """
        hang_up = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
        for number in (signal.SIGINT, signal.SIGTERM, *hang_up):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self.number = signal.Signals(number).name, number


def run_parts(
    parts: Sequence[Part],
    launch: Launch,
    folder: Path,
    seconds: float,
    changed: Callable[[list[Outcome]], None],
    stop: StopSignals,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run parts in order until the time has passed, and return the outcome of each.

    Args:
        parts: Parts, the most valuable first.
        launch: Returns the command that runs a part.
        folder: Existing folder for the rows and the output of each part.
        seconds: Time for all parts together.
        changed: Called with all outcomes when a part has started, added rows or ended.
        stop: Signals that end the run.
        clock: Returns the time in seconds.
    """
    ends = clock() + seconds
    outcomes: list[Outcome] = []
    for part in parts:
        outcomes.append(outcome := Outcome(part.name, "running"))
        left = ends - clock()
        if stop.name:
            outcome.status = f"not started: {stop.name}"
        elif left < LEAST:
            outcome.status = "not started: out of time"
        else:
            _run_part(part, launch, folder, min(part.seconds, left), outcome, outcomes, changed, stop, clock)
        changed(outcomes)
    return outcomes


def _run_part(
    part: Part,
    launch: Launch,
    folder: Path,
    limit: float,
    outcome: Outcome,
    outcomes: list[Outcome],
    changed: Callable[[list[Outcome]], None],
    stop: StopSignals,
    clock: Callable[[], float],
) -> None:
    path, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    started = clock()
    changed(outcomes)
    with log.open("wb") as output:
        process = _started(launch(part, path, limit), output)
        ended = ""
        try:
            while process.poll() is None and not ended:
                if stop.name:
                    ended = f"stopped: {stop.name}"
                elif clock() - started > limit:
                    ended = "stopped: out of time"
                else:
                    _wait(process)
                rows = read_rows(path)
                if len(rows) > len(outcome.rows):
                    outcome.rows, outcome.seconds = rows, clock() - started
                    changed(outcomes)
        finally:
            _kill(process)
    rows = read_rows(path)
    outcome.rows = [row for row in rows if row["kind"] != _STATUS]
    stated = [str(row["status"]) for row in rows if row["kind"] == _STATUS]
    outcome.status = (stated or [ended or _status(process.returncode, log)])[-1]
    outcome.seconds = clock() - started


def status_row(status: str) -> Row:
    """Return the row with which a part states why it has not measured."""
    return {"kind": _STATUS, "status": status}


def _started(command: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    # A separate session, so that compilers that the part has started end with it.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=sys.platform != "win32",
    )


def _wait(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_POLL)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a part and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, _KILL)
        else:
            process.kill()
    process.wait()


def _status(code: int, log: Path) -> str:
    if code == 0:
        return "measured"
    if code < 0:
        return f"failed: ended by signal {-code}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"failed: {lines[-1][:160] if lines else f'exit code {code}'}"
