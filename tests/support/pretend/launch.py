"""Subprocesses with a pretended GPU: compilation of the device guard, and the start of the worker."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.compilers import GXX

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_name("device_guard.cpp")


def torch_folder() -> Path:
    """Return the folder of PyTorch without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def device_guard() -> Path:
    """Compile the device guard once per version of PyTorch and user, and return the library."""
    folder = torch_folder()
    version = (folder / "version.py").read_bytes()
    key = hashlib.sha256(SOURCE.read_bytes() + version + str(folder).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"tnnlm-pretend-{os.getuid()}" / f"guard-{key}.so"
    if not library.is_file():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        built = library.with_suffix(f".{os.getpid()}")  # renamed, so that no process loads half a library
        options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{folder / 'include'}", f"-L{folder / 'lib'}"]
        subprocess.run([GXX, *options, SOURCE, "-o", built, "-lc10", "-ltorch_cpu"], check=True)
        os.replace(built, library)
    return library


def load_device_guard(library: str) -> None:
    """Load the device guard into this process, in which PyTorch must not be imported yet."""
    assert "torch" not in sys.modules
    for path in (torch_folder() / "lib/libc10.so", torch_folder() / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def pretended(scenario: str, *words: str) -> dict[str, Any]:
    """Run a scenario of the worker in the current folder and return what it reports.

    Args:
        scenario: Name of a function of :mod:`tests.support.pretend.worker`.
        words: Settings of the run, as on the command line of train.py.
    """
    if GXX is None or not sys.platform.startswith("linux"):
        pytest.skip("the pretended GPU needs Linux and a C++ compiler")
    report = Path("pretended.json")
    command = [sys.executable, "-m", "tests.support.pretend.worker", device_guard(), report, scenario, *words]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-20_000:]
    return json.loads(report.read_text())
