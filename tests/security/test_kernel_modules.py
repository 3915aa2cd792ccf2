"""A checkpoint or run of a stranger names a Python file: it runs only if the user named or allowed it."""

from __future__ import annotations

import hashlib
import py_compile
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hostile import write_module, write_run
from tests.support.scripts import assert_refused
from tnnlm.config import kernel_module
from tnnlm.config.loader import load_config
from tnnlm.errors import ConfigError
from tnnlm.trust import Trust

TRACE = "ran"
WORDS = {
    "convert": ("convert", "theirs"),
    "generate": ("generate", "--model", "theirs", "--prompt", "the"),
    "resume": ("train", "--resume", "theirs"),
    "resume, dry run": ("train", "--resume", "theirs", "--dry-run"),
    "init": ("train", "--init-from", "theirs"),
    "init, dry run": ("train", "--init-from", "theirs", "--dry-run"),
}
"""Commands that load the run of a stranger."""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no module that another test ran count as run in this process."""
    monkeypatch.setattr(kernel_module, "_EXECUTED", {})


@pytest.fixture
def module(_quiet: None) -> Path:
    """Write a run with a kernel module inside it, and return the module."""
    folder = Path("theirs")
    folder.mkdir()
    path = write_module(folder / "kernel.py", TRACE)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    write_run(folder, name="theirs", module=str(path), module_sha256=sha256)
    return path


def sha256_in(checkpoint: Path) -> str:
    data = torch.load(checkpoint, weights_only=True)
    found: str = data["tnnlm"]["config"]["model"]["kernel"]["module_sha256"]
    return found


@pytest.mark.parametrize("case", WORDS)
def test_module_that_a_stranger_names_does_not_run(case: str, module: Path, script: Any) -> None:
    refused = script(*WORDS[case])
    assert not Path(TRACE).exists()
    assert_refused(refused, str(module), "--kernel-module", "--trust-code")


@pytest.mark.parametrize("name", ["os", "theirs.kernel", "theirs.missing.kernel"])
def test_module_that_is_named_by_its_import_name_is_not_looked_up(
    name: str, module: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    Path("theirs/__init__.py").write_text(f"open({TRACE!r}, 'w')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    write_run(Path("other"), name="theirs", module=name, module_sha256="0" * 64)
    refused = script("convert", "other")
    assert not Path(TRACE).exists()
    assert_refused(refused, f"model.kernel.module={name}", "--trust-code")


def test_module_runs_if_it_is_allowed_and_is_known_afterwards(module: Path, script: Any) -> None:
    assert script("convert", "theirs", "--trust-code").code == 0
    assert Path(TRACE).exists()
    kernel_module._EXECUTED.clear()
    again = script("convert", "theirs", "--force")
    assert again.code == 0, again.err
    # Another file of the same name is not known.
    Path(TRACE).unlink()
    module.write_text(f"open({TRACE!r}, 'w')", encoding="utf-8")
    assert_refused(script("convert", "theirs", "--force"), "has the SHA-256", "--trust-code")
    assert not Path(TRACE).exists()


@pytest.mark.parametrize("command", ["convert", "train"])
def test_module_that_the_user_names_runs_if_it_has_the_recorded_hash(
    command: str, module: Path, script: Any
) -> None:
    mine = Path(shutil.move(module, "mine.py"))
    words = {
        "convert": ("convert", "theirs", "--kernel-module", str(mine)),
        "train": ("train", "--resume", "theirs", "--dry-run", f"model.kernel.module={mine}"),
    }[command]
    done = script(*words)
    assert done.code == 0, done.err
    Path(TRACE).unlink()
    mine.write_text(f"open({TRACE!r}, 'w')", encoding="utf-8")
    assert_refused(script(*words, *(["--force"] if command == "convert" else [])), "mine.py", "--trust-code")
    assert not Path(TRACE).exists()


def test_module_of_an_old_checkpoint_runs_if_the_user_names_it(module: Path, script: Any) -> None:
    write_run(Path("old"), name="theirs", module=str(module))
    assert_refused(script("convert", "old"), str(module))
    done = script("convert", "old", "--kernel-module", str(module))
    assert done.code == 0, done.err


def test_hash_of_the_source_is_recorded_and_checked_in_a_file_of_the_user(module: Path) -> None:
    words = [f"model.kernel.module={module}", "model.kernel.name=theirs"]
    config = load_config(None, words)
    assert config.model.kernel.module_sha256 == hashlib.sha256(module.read_bytes()).hexdigest()
    Path("mine.yaml").write_text(
        f"model:\n  kernel: {{name: theirs, module: {module}, module_sha256: '{'1' * 64}'}}\n"
    )
    with pytest.raises(ConfigError, match="has the SHA-256"):
        load_config("mine.yaml")
    assert load_config("mine.yaml", ["model.kernel.module_sha256=null"])
    Path("copy.py").write_bytes(module.read_bytes())
    assert load_config("mine.yaml", ["model.kernel.module=copy.py"])
    assert load_config("mine.yaml", trust=Trust(code=True))


def test_file_whose_name_has_a_dot_is_in_no_package(module: Path) -> None:
    dotted = Path(shutil.copy(module, "kernel.v2.py"))
    config = load_config(None, [f"model.kernel.module={dotted}", "model.kernel.name=theirs"])
    assert config.model.kernel.module_sha256 == hashlib.sha256(module.read_bytes()).hexdigest()
    assert Path(TRACE).exists()


def test_bytecode_next_to_the_file_is_not_executed(module: Path, script: Any) -> None:
    evil = write_module(Path("evil.py"), "evil ran")
    cache = module.parent / "__pycache__"
    cache.mkdir()
    name = Path(py_compile.compile(str(module), doraise=True)).name
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(evil), str(cache / name), doraise=True, invalidation_mode=mode)
    assert script("convert", "theirs", "--trust-code").code == 0
    assert not Path("evil ran").exists()
    assert Path(TRACE).exists()


def test_checkpoint_of_an_own_run_has_the_hash(module: Path, script: Any) -> None:
    Path("text.txt").write_text("the cat sat on the mat.\n\n" * 200, encoding="utf-8")
    small = ("model.d_model=16", "model.n_layers=1", "model.max_length=16", "model.vocab_size=300")
    data = ("data.source=files", "data.files=text.txt", "data.batch_size=2", "trainer.accelerator=cpu")
    steps = ("trainer.max_steps=2", "trainer.sample_tokens=1", "conversion.method=etsc")
    kernel = (f"model.kernel.module={module}", "model.kernel.name=theirs", "model.kernel.rpe_dim=4")
    done = script("train", "name=mine", *small, *data, *steps, *kernel)
    assert done.code == 0, done.err
    run = Path("runs/mine")
    assert sha256_in(run / "checkpoints/last.ckpt") == hashlib.sha256(module.read_bytes()).hexdigest()
    kernel_module._EXECUTED.clear()
    resumed = script("train", "--resume", "runs/mine", "trainer.max_steps=4")
    assert resumed.code == 0, resumed.err
