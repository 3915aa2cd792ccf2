"""Fixtures: tiny models, a tiny run, and every test in a folder and cache of its own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several share the cores; said before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.support.models import tiny_config
from tests.support.scripts import SCRIPTS, Result
from tests.support.simulated import MACHINES, forget_probes
from tnnlm.errors import run_script
from tnnlm.models.causal_lm import CausalLM


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder of one's own, offline, with fixed seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TNNLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    return


@pytest.fixture
def tiny_model() -> CausalLM:
    """In float64, eval mode, parallel form."""
    return CausalLM(tiny_config()).double().eval()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call a script in this process: script("train", "optim.lr=1")."""

    def call(name: str, *words: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        capsys.readouterr()
        try:
            code = run_script(SCRIPTS[name].main)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, its text and its cache."""
    folder = tmp_path_factory.mktemp("trained")
    from tests.support.training_runs import tiny_run
    from tnnlm.training.run import train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TNNLM_CACHE", str(folder / "cache"))
        train(tiny_run("name=tiny", "trainer.max_steps=4"), None)
    return folder


@pytest.fixture
def run_here(tiny_trained: Path, _quiet: None) -> Path:
    """The trained run in this test's own folder."""
    shutil.copytree(tiny_trained, Path.cwd(), dirs_exist_ok=True)
    return Path("runs/tiny")


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A simulated machine of ``simulated.MACHINES``, by indirect parametrisation; its name."""
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
    """A tiny converted model, packed."""
    from tests.support.servers import tiny_generator  # not every test needs a server's packages

    return tiny_generator()


@pytest.fixture(scope="module")
def server(generator: Any) -> Iterator[Any]:
    """It behind a server with small limits and no key."""
    from tests.support.servers import run_server

    with run_server(generator, max_prompt_tokens=2000, max_tokens=3000) as running:
        yield running
