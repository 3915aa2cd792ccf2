"""Rendering of chat templates by a process with limits, which is started once and restarted if it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tnnlm.errors import UserError

SECONDS = 20.0
"""Processor time for one conversation, in seconds."""
MEGABYTES = 1024
"""Memory of the process, in MiB."""
LONGEST_TEXT = 1 << 24
"""Largest number of characters of a text."""
LONGEST_TEMPLATE = 1 << 18
"""Largest number of characters of a template."""
_WALL = 10
"""Largest time in multiples of the processor time, for systems that don't limit the latter."""
_WORKER = Path(__file__).with_name("worker.py")


class RenderedText(NamedTuple):
    """Text of messages by a template."""

    text: str
    """Text, which models read as tokens."""
    spans: tuple[tuple[int, int], ...]
    """Ranges [start, end) of characters that the template marks by ``{% generation %}``."""


class Renderer:
    """Process that renders templates; a context manager that ends it.

    Args:
        seconds: Processor time for one conversation, in seconds.
        longest: Largest number of characters of a text.
    """

    def __init__(self, seconds: float = SECONDS, longest: int = LONGEST_TEXT) -> None:
        self._settings = {"seconds": seconds, "megabytes": MEGABYTES, "longest": longest}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def render(self, template: str, variables: Sequence[dict[str, Any]], where: str) -> list[RenderedText]:
        """Return strings that one template makes.

        Args:
            template: Source of the template.
            variables: Variables of each string, such as ``messages`` and ``add_generation_prompt``.
            where: Place that error messages start with.

        Raises:
            UserError: If the template fails, or exceeds a limit.
        """
        if len(template) > LONGEST_TEMPLATE:
            raise UserError(
                f"{where}: the chat template has {len(template):,} characters",
                f"use at most {LONGEST_TEMPLATE:,}",
            )
        reply = self._ask(json.dumps({"template": template, "texts": list(variables)}))
        if reply is None:
            self.close()
            found = f"takes more than {self._settings['seconds']:g} seconds, or more memory than it may"
            raise UserError(f"{where}: the chat template {found}", "use a simpler one")
        if "error" in reply:
            raise UserError(
                f"{where}: the chat template fails ({reply['error']})", "correct it, or use another"
            )
        return [
            RenderedText(one["text"], tuple((start, end) for start, end in one["spans"]))
            for one in reply["texts"]
        ]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()

    def _ask(self, request: str) -> dict[str, Any] | None:
        """Return the reply of the process; None if it ended, because the template exceeded a limit."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(_WALL * self._settings["seconds"], process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            return None
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            # -P: modules of the working directory must not replace those of Python.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), json.dumps(self._settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",  # JSON escapes all other characters
            )
        return self._process
