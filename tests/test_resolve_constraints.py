"""Tests of tools/resolve_constraints.py with a fake uv: what resolves, what is built, and what fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.scripts import ROOT, Result
from tnnlm.errors import run_script

UV = """#!{python}
import pathlib, sys
words = sys.argv[1:]
with open({log!r}, "a") as file:
    print(*words, file=file)
value = lambda name: words[words.index(name) + 1]
if "--universal" in words:
    print("torch==" + pathlib.Path(value("--constraints")).read_text().split("==")[1].strip())
elif value("--python-version") == "3.12":
    sys.exit("error: No solution found\\n  cause: numpy")
else:
    pathlib.Path(value("--output-file")).write_text({lock!r})
"""
LOCK = """
[[packages]]
name = "numpy"
wheels = [{ url = "where/numpy-2.4.6-cp313-cp313-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl" }]
[[packages]]
name = "pluggy"
wheels = [{ url = "where/pluggy-1.7.0-py3-none-any.whl" }]
[[packages]]
name = "onnxruntime"
wheels = [{ url = "where/onnxruntime-1.32.0-cp313-cp313-macosx_14_0_arm64.whl" }]
[[packages]]
name = "sqlitedict"
sdist = { url = "where/sqlitedict-2.1.0.tar.gz" }
[[packages]]
name = "unheard-of"
wheels = [{ url = "where/unheard_of-1.0-py3-none-any.whl" }]
"""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    path = ROOT / "tools/resolve_constraints.py"
    spec = importlib.util.spec_from_file_location("resolve_constraints", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def tool(module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls the tool; the fake uv writes its arguments to log.txt."""
    script = UV.format(python=sys.executable, log=str(Path("log.txt").resolve()), lock=LOCK)
    Path("uv").write_text(script, encoding="utf-8")
    Path("uv").chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda *words, **given: str(Path("uv").resolve()))

    def call(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["resolve_constraints.py", *words])
        return Result(run_script(module.main), *capsys.readouterr())

    return call


def test_what_is_built_and_what_is_not_pinned(tool: Any) -> None:
    done = tool("--python", "3.13", "--system", "linux-x86_64", "--system", "macos-arm64")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "Python 3.13, linux-x86_64: 5 packages resolve",
        "  built from source: onnxruntime, sqlitedict",
        "  not pinned: unheard-of",
        "Python 3.13, macos-arm64: 5 packages resolve",
        "  built from source: numpy, sqlitedict",
        "  not pinned: unheard-of",
    ]
    first, second = Path("log.txt").read_text(encoding="utf-8").splitlines()
    assert "--constraints constraints.txt --python-version 3.13 --python-platform x86_64-" in first
    assert "--python-platform aarch64-apple-darwin" in second


def test_version_that_fails_is_reported_and_the_others_are_checked(tool: Any) -> None:
    done = tool("--system", "linux-x86_64")
    assert done.code == 1
    assert "Python 3.12, linux-x86_64: can't be resolved\n  error: No solution found\n" in done.out
    for version in ("3.11", "3.13", "3.14"):
        assert f"Python {version}, linux-x86_64: 5 packages resolve" in done.out


def test_newest_keeps_torch(tool: Any, module: ModuleType) -> None:
    assert tool("--newest") == Result(0, f"torch=={module.pins()['torch']}\n", "")


def test_without_uv(tool: Any, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda *words, **given: None)
    assert tool() == Result(2, "", "error: uv is not installed; run: pip install uv\n")


def test_torch_depends_on_what_all_its_builds_share(module: ModuleType) -> None:
    settings = module.torch_settings(module.pins()["torch"])
    assert "sympy" in settings
    assert "nvidia" not in settings
    with pytest.raises(module.UserError, match="torch==0 must be installed"):
        module.torch_settings("0")
