"""The C++ compiler is probed in the same way as PyTorch runs it: its name, its folder, and its output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import cpp_compiler_search, run_compile_cmd
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from tests.support.compilers import GXX, fake_compiler, needs_gxx
from tests.support.simulated import forget_probes, name_compiler
from tnnlm.errors import UserError
from tnnlm.inference.aot_package import check_compiler
from tnnlm.machine import cpp_compiler
from tnnlm.machine.capabilities import capability
from tnnlm.machine.cpp_compiler import compiler_names, complaint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="compilers here are shell scripts")


@pytest.fixture(autouse=True)
def _probe_again() -> Iterator[None]:
    forget_probes()
    yield
    forget_probes()


def torch_runs(name: str, folder: Path) -> bool:
    """Return whether PyTorch itself finds this compiler and can build a library with it."""
    folder.mkdir()
    (folder / "probe.cpp").write_text("int probe;\n", encoding="ascii")
    try:
        chosen = cpp_compiler_search.__wrapped__((name,))
        run_compile_cmd(f"{chosen} probe.cpp -shared -fPIC -o probe.so", str(folder))
    except (InvalidCxxCompiler, CppCompileError, OSError, ValueError):
        return False
    return True


NAMES = {
    "g++": "",
    "": "CXX: is empty, unset it",
    "  ": "CXX: is empty, unset it",
    "g++ -O1": "g++ -O1: PyTorch needs the name of one program, without options",
    "env g++": "without options",
    "no-such-compiler": "no-such-compiler: not found, install g++",
    "{here}/g++": "",
    "{here}/my tools/g++": "my tools/g++: PyTorch can't run a path with a space or quote, use a",
    "'{here}/my tools/g++'": "not found",
    "{here}/it's/g++": "use a symbolic link",
    "./g++": "./g++: PyTorch runs it in another folder, use an absolute path",
    "{here}": "Permission denied",
    "{here}/versionless": "no version here",
    "{here}/lazy": "exit code 3",
}
"""Values of CXX, and the error message for each."""


@needs_gxx
@pytest.mark.parametrize("name", NAMES)
def test_compiler_is_accepted_where_pytorch_can_run_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("", "my tools", "it's"):
        fake_compiler(tmp_path / folder / "g++", f'exec {GXX} "$@"')
    fake_compiler(
        tmp_path / "versionless", f'[ "$1" != --version ] && exec {GXX} "$@"; echo no version here; exit 1'
    )
    fake_compiler(tmp_path / "lazy", '[ "$1" = --version ] || exit 3')
    said, name = NAMES[name], name.format(here=tmp_path)
    name_compiler(monkeypatch, name)
    found = capability("cpp_compiler")
    assert found.available == torch_runs(name, tmp_path / "torch")
    assert found.available == (not said)
    assert said in found.reason
    if said:
        with pytest.raises(UserError, match="--compile: no working C\\+\\+ compiler") as raised:
            check_compiler()
        assert "\n" not in str(raised.value)


@needs_gxx
def test_first_working_compiler_is_used(tmp_path: Path) -> None:
    broken = str(fake_compiler(tmp_path / "broken", '[ "$1" = --version ] || { echo no licence; exit 1; }'))
    for names, said in (
        ((None, "missing", "g++", broken), ""),
        ((None, "missing", broken, "g++"), "no licence"),
        ((None, "missing", "absent"), "missing: not found, install g++ or set CXX to a compiler; absent:"),
        ((None,), "contains no compiler"),
        ("g++", ""),
    ):
        forget_probes()
        with inductor_config.patch({"cpp.cxx": names}):
            found = capability("cpp_compiler")
        assert found.available == (not said)
        assert said in found.reason


def test_compiler_is_read_from_the_environment_until_pytorch_has_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    monkeypatch.setenv("CXX", "one")
    assert compiler_names() == ["one"]
    monkeypatch.delenv("CXX")
    assert compiler_names() == ["clang++" if sys.platform == "darwin" else "g++"]


@needs_gxx
@pytest.mark.parametrize("variable", ["TMPDIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_folder_that_pytorch_cannot_compile_in_is_reported(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a b"
    place.mkdir()
    monkeypatch.setenv(variable, str(place))
    monkeypatch.setattr("tempfile.tempdir", None)  # clears the value that Python has cached
    assert f"{place}, has a space or quote in its path" in capability("cpp_compiler").reason


def test_pytorch_in_a_folder_with_a_space_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.__file__", str(tmp_path / "my project/torch/__init__.py"))
    assert capability("cpp_compiler").reason.startswith("PyTorch's folder, ")


@pytest.mark.parametrize("when", ["asked for its version", "compiling"])
def test_hanging_compiler_is_killed_with_its_child_processes(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "[ $1 = --version ] && exit 0; " if when == "compiling" else ""
    script = f"{answer}sleep 600 & echo $! > {tmp_path}/child; wait"
    name_compiler(monkeypatch, str(fake_compiler(tmp_path / "slow", script)))
    monkeypatch.setattr(cpp_compiler, "_SECONDS", 1.0)
    assert "slow: did not finish within the timeout" in capability("cpp_compiler").reason
    child = int((tmp_path / "child").read_text())
    try:
        for _ in range(100):
            if not is_running(child):
                return
            time.sleep(0.05)
        pytest.fail("the child process of the compiler is still running")
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)


def is_running(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def test_windows_compiler_is_run_with_msvc_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_compiler, "_WINDOWS", True)
    monkeypatch.delenv("CXX", raising=False)
    assert compiler_names() == ["cl"]
    script = '[ "$*" = /help ] && exit 1; [ "$*" = "probe.cpp /LD /Feprobe.dll" ] && touch probe.dll'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "cl", script)))
    assert capability("cpp_compiler")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("", ""),
        ("\n  no licence\nbye\n", "no licence"),
        ("In file included from a.h:1:\nb.h:2:1: error: bad\nc.h:1: error: worse\n", "b.h:2:1: error: bad"),
    ],
)
def test_line_that_says_what_is_wrong(output: str, line: str) -> None:
    assert complaint(output) == line
