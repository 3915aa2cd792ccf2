"""Where a measurement comes from, which its record states: command, machine, date and commit."""

from __future__ import annotations

import subprocess
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def current_commit() -> str:
    """Return the abbreviated commit of this checkout, ``unknown`` outside one."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(command: str, machine: str) -> dict[str, str]:
    """Return what every record in docs/records begins with.

    Args:
        command: Command line that was run.
        machine: Description of the machine.
    """
    import torch  # the commit alone is also needed where nothing is installed

    from tnnlm.machine.capabilities import cpu_level

    return {
        "command": command,
        "machine": machine,
        "cpu_level": cpu_level(),
        "torch": torch.__version__.partition("+")[0],
        "date": date.today().isoformat(),
        "commit": current_commit(),
    }
