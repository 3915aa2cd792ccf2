"""Runs of several processes that Lightning or torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS

WORKER = ROOT / "tests/support/ddp_worker.py"


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """Start the worker; loopback only, one thread a process."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONWARNINGS": "ignore",
            **environment,
        },
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for them, and show what went wrong."""
    for process in processes:
        try:
            _, errors = process.communicate(timeout=600)
        finally:
            process.kill()
        assert process.returncode == 0, errors


def run_worker(*words: str) -> None:
    """Run to the end."""
    finish(start(str(WORKER), *SETTINGS, *words))
