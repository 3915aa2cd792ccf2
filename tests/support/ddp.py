"""Runs of several processes, started by Lightning or torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS

WORKER = ROOT / "tests/support/ddp_worker.py"


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process with one thread that communicates over the loopback interface."""
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
    """Wait for the processes and show the errors of those that fail."""
    for process in processes:
        try:
            _, errors = process.communicate(timeout=600)
        finally:
            process.kill()
        assert process.returncode == 0, errors


def run_worker(*words: str) -> None:
    """Run the worker and wait for its end."""
    finish(start(str(WORKER), *SETTINGS, *words))
