"""Commands that are killed while they replace a converted model or prepare data, and then run to their end.

They run in processes of a fork server that has imported everything, so that a kill comes during the work.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from crashes.leftovers import leftovers
from tnnlm.checkpoints.converted import load_converted, model_fingerprint
from tnnlm.cli import run
from tnnlm.errors import UserError
from tnnlm.files import restore_replaced

HORIZONS = ("32", "48")
"""Horizons of the conversions that replace each other; every kernel has the method ``window``."""
_MODULES = ["tnnlm.cli.convert", "tnnlm.cli.prepare_data", "tnnlm.deployment.pipeline", "tnnlm.data.packing"]


class Command(NamedTuple):
    """Command of tnnlm to kill."""

    name: str
    """Name of the subcommand."""
    words: list[str]
    """Arguments."""
    prepare: Callable[[], None]
    """Function that makes the command do all of its work again."""
    check_killed: Callable[[], str]
    """Function that returns what a kill has damaged, or an empty string."""
    check_ended: Callable[[], str]
    """Function that returns what is wrong after the command has run to its end, or an empty string."""


class KilledCommands:
    """Commands that are killed at random moments and repeated, in one folder."""

    def __init__(self, folder: Path) -> None:
        # Killed processes leave the semaphores of progress bars to the resource tracker, which warns.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        methods = multiprocessing.get_all_start_methods()
        self._context = cast(
            Any, multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        )
        if "forkserver" in methods:
            self._context.set_forkserver_preload(_MODULES)
        self._context.Process(target=_nothing).start()  # imports the modules
        self._folder = folder
        self._seconds: dict[str, float] = {}
        self.differences: list[str] = []

    def kill(self, command: Command, moments: random.Random) -> dict[str, Any]:
        """Kill a command at a random moment, and then run it to its end.

        Returns:
            Time and place of the kill.

        Raises:
            UserError: If the command fails by itself.
        """
        key = " ".join([command.name, *command.words])
        if key not in self._seconds:
            command.prepare()
            started = time.perf_counter()
            self._run(command)
            self._seconds[key] = time.perf_counter() - started
            command.check_ended()  # notes the result
        while True:
            command.prepare()
            seconds = moments.random() * self._seconds[key]
            if self._run(command, seconds):
                break
        place = "at work" if self._leftovers() else "before or after"
        self._note(command, "after the kill", command.check_killed())
        self._run(command)
        self._note(command, "after the next start", command.check_ended())
        for path in self._leftovers():
            self._note(command, "left over", str(path.relative_to(self._folder)))
        return {"seconds": round(seconds, 3), "last_logged_step": 0, "place": f"{command.name}, {place}"}

    def _note(self, command: Command, where: str, problem: str) -> None:
        if problem:
            self.differences.append(f"{command.name}, {where}: {problem}")

    def _leftovers(self) -> list[Path]:
        return leftovers(*(self._folder / name for name in ("runs/whole", "cache", "prepared")))

    def _run(self, command: Command, seconds: float | None = None) -> bool:
        """Run a command to its end, or kill it; return whether it was killed.

        Raises:
            UserError: If it fails by itself; the message is the last line that it printed.
        """
        output = self._folder / "output.txt"
        process = self._context.Process(
            target=_call, args=(self._folder, command.name, command.words, output)
        )
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return True
        if process.exitcode != 0:
            lines = output.read_text(encoding="utf-8").splitlines() or [f"exit code {process.exitcode}"]
            raise UserError(f"{command.name} failed: {lines[-1]}")
        return False


def _nothing() -> None:
    """Do nothing, in a process that has imported the modules."""


def _call(folder: Path, name: str, words: list[str], output: Path) -> None:
    """Run a command in ``folder`` with its output in a file, in a new process."""
    os.chdir(folder)
    os.environ["TNNLM_CACHE"] = str(folder.resolve() / "cache")
    with (
        output.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        code = run(name, words)
    raise SystemExit(code)


def conversions(run_folder: Path) -> list[Command]:
    """Return the commands that replace the converted model of a run by one of another horizon."""
    folder = run_folder / "converted"
    known: dict[str, str] = {}

    def fingerprint() -> str:
        restore_replaced(folder)
        found = load_converted(folder)
        own = model_fingerprint(found.model)
        if own != found.fingerprint:
            raise UserError(f"{folder}: weights and configuration are of two models")
        return own

    def problem(horizon: str | None) -> str:
        try:
            found = fingerprint()
        except UserError as error:
            return str(error)
        if horizon is None:
            return "" if found in known.values() else "has another model than before"
        return "" if known.setdefault(horizon, found) == found else "has another model than without a kill"

    return [
        Command(
            "convert",
            [str(run_folder), "--force", "--no-compile", "--method", "window", "--horizon", horizon],
            lambda: None,
            lambda: problem(None),
            lambda horizon=horizon: problem(horizon),  # type: ignore[misc]
        )
        for horizon in HORIZONS
    ]


def preparation(folder: Path, words: list[str]) -> Command:
    """Return the command that prepares the data of ``words`` from the start, in the cache of ``folder``."""
    cache = folder / "prepared"
    reference: dict[str, bytes] = {}

    def problem() -> str:
        found = {path.name: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
        if not reference:
            reference.update(found)
        names = sorted(name for name in found.keys() | reference if found.get(name) != reference.get(name))
        return f"differs: {', '.join(names)}" if names else ""

    return Command(
        "prepare-data",
        [*words, f"data.cache_dir={cache.resolve()}"],
        lambda: shutil.rmtree(cache, ignore_errors=True),
        lambda: "",
        problem,
    )
