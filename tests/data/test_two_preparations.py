"""Two processes that prepare the same data at once, and what a killed one leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.config.loader import load_config
from tnnlm.data.packing import PackedCorpus, prepare
from tnnlm.errors import DataError

STOPPED = f"""
import sys
from tnnlm.config.loader import load_config
from tnnlm.data import packing
def stopped(*args):
    print("holds the lock", flush=True)
    sys.stdin.read()
packing.load_corpus = stopped
packing.prepare(load_config(None, {[*SETTINGS]!r}).data, 400, 0, resumable=sys.argv[1] == "resumable")
"""


@contextmanager
def stopped(kind: str) -> Iterator[int]:
    """Prepare the data in another process up to the reading of the text; yield its number, then kill it."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, kind],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "holds the lock\n"
            yield process.pid
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


def prepared() -> PackedCorpus:
    return prepare(load_config(None, SETTINGS).data, 400, 0, resumable=True)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_second_preparation_is_refused_and_takes_over_after_a_kill() -> None:
    write_text()
    with (
        stopped("resumable"),
        pytest.raises(DataError, match=r"\.part: another process prepares the same data.*; wait until"),
    ):
        prepared()
    folder = prepared().folder
    assert os.listdir("cache") == [folder.name]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("kind", ["resumable", "whole"])
def test_refusal_names_the_holder_and_a_kill_leaves_nothing(kind: str) -> None:
    write_text()
    with stopped(kind) as number, pytest.raises(DataError) as refused:
        prepared()
    assert f"(process {number} on {socket.gethostname()} since " in str(refused.value)
    assert os.listdir("cache") != []
    folder = prepared().folder
    assert os.listdir("cache") == [folder.name]
