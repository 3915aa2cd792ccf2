"""Shared fixtures: tiny models, a tiny run, and a temporary folder and cache for every test."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; has to be set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.support.models import tiny_config
from tests.support.scripts import SCRIPTS, Result
from tests.support.simulated import MACHINES, forget_probes
from tests.support.unchanged import files_under, watch_refusals
from tnnlm.config import kernel_module
from tnnlm.errors import run_script
from tnnlm.kernels import base
from tnnlm.models.causal_lm import CausalLM

if hasattr(signal, "SIGHUP"):  # nohup ignores it, which the commands that the tests start would inherit
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in a temporary folder, offline, and with fixed seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TNNLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("tnnlm.cli.convert.BY_DEFAULT", ())  # takes half a minute; one test compiles
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_kernels_end() -> Iterator[None]:
    """Forget the kernels that a test registered, which help and schema would list in later tests."""
    registries: tuple[dict[str, Any], ...] = (base.KERNEL_SCHEMAS, base._BUILDERS, kernel_module._EXECUTED)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture(autouse=True)
def _refusals_change_no_run(_quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare all files of the runs before and after every start or resume that is refused."""
    watch_refusals(monkeypatch)


@pytest.fixture
def tiny_model() -> CausalLM:
    """Return a tiny model in float64 and eval mode, in its parallel form."""
    return CausalLM(tiny_config()).double().eval()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls a script in this process, such as script("train", "optim.lr=1")."""

    def call(name: str, *words: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        capsys.readouterr()
        before = files_under(Path("runs")) if name == "train" else {}
        try:
            code = run_script(SCRIPTS[name].main)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        result = Result(code, *capsys.readouterr())
        if name == "train" and code == 2 and "stopped" not in result.err:  # a refusal, not a failed training
            assert files_under(Path("runs")) == before, result.err
        return result

    return call


@pytest.fixture(scope="session")
def tiny_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trained run, its training text and its cache."""
    folder = tmp_path_factory.mktemp("trained")
    from tests.support.training_runs import tiny_run, working_in
    from tnnlm.training.run import train

    with working_in(folder):
        train(tiny_run("name=tiny", "trainer.max_steps=4"), None)
    return folder


@pytest.fixture
def run_here(tiny_trained: Path, _quiet: None) -> Path:
    """Copy the trained run into the temporary folder of the test and return its path."""
    shutil.copytree(tiny_trained, Path.cwd(), dirs_exist_ok=True)
    return Path("runs/tiny")


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Simulate a machine of ``simulated.MACHINES``, selected by indirect parametrisation; yield its name."""
    threads, onednn = torch.get_num_threads(), torch._C._get_mkldnn_enabled()
    forget_probes()
    MACHINES[request.param](monkeypatch)
    yield request.param
    torch.set_num_threads(threads)
    torch._C._set_mkldnn_enabled(onednn)
    monkeypatch.undo()
    forget_probes()


@pytest.fixture(scope="session")
def generator() -> Any:
    """Return a tiny converted model, packed for decoding."""
    # Imported here, because not every test needs the packages of the server.
    from tests.support.servers import tiny_generator

    return tiny_generator()


@pytest.fixture(scope="module")
def server(generator: Any) -> Iterator[Any]:
    """Serve the model of ``generator`` with small limits and without a key."""
    from tests.support.servers import run_server

    with run_server(generator, max_prompt_tokens=2000, max_tokens=3000) as running:
        yield running
