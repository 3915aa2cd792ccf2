"""Compiled steps: made by default where possible, never at the cost of the conversion, and on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import assert_refused
from tnnlm.checkpoints.converted import load_converted
from tnnlm.cli import convert
from tnnlm.deployment import packages
from tnnlm.errors import UserError
from tnnlm.machine.resident import available_memory


@pytest.fixture(autouse=True)
def _compiles_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "BY_DEFAULT", ("float32",))
    monkeypatch.setattr(packages, "check_compiler", lambda: None)


def compiles_with(monkeypatch: pytest.MonkeyPatch, outcome: BaseException | None = None) -> list[str]:
    """Replace the compiler by one that writes an empty package or raises; return the list of its dtypes."""
    made: list[str] = []

    def compile_step(model: Any, folder: Path, dtype: str, fingerprint: str) -> Path:
        assert {"config.json", "conversion.json", "README.md"} <= {path.name for path in folder.iterdir()}
        made.append(dtype)
        if outcome is not None:
            raise outcome
        (folder / f"step-{dtype}.pt2").touch()
        return folder / f"step-{dtype}.pt2"

    def compile_batch(model: Any, folder: Path, dtype: str, fingerprint: str) -> Path:
        made.append(f"batch-{dtype}")
        if outcome is not None:
            raise outcome
        return folder / f"batch-{dtype}.pt2"

    monkeypatch.setattr(packages, "compile_step", compile_step)
    monkeypatch.setattr(packages, "compile_batch", compile_batch)
    return made


def test_float32_is_compiled_by_default_into_the_complete_folder(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiles_with(monkeypatch)
    done = script("convert", "runs/tiny")
    assert (done.code, made) == (0, ["float32"])
    place = run_here / "converted/step-float32.pt2"
    lines = done.out.splitlines()
    announced = next(
        i for i, line in enumerate(lines) if line.startswith("compiling the float32 decoding step")
    )
    assert f"into {place}; --no-compile omits it" in lines[announced]
    assert lines[announced + 1] == f"wrote {place}"
    made.clear()
    assert "compil" not in script("convert", "runs/tiny", "--force", "--no-compile").out
    assert made == []


FAILURES = {
    "default": ((), 0, "note: no compiled step: RuntimeError: boom"),
    "requested": (("--compile",), 1, "FAILED: --compile float32: RuntimeError: boom"),
    "batch": (("--compile", "batch"), 1, "FAILED: --compile float32 batch: RuntimeError: boom"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_only_a_requested_step_that_fails_is_a_failure(
    case: str, run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, code, said = FAILURES[case]
    compiles_with(monkeypatch, RuntimeError("boom\nand more"))
    done = script("convert", "runs/tiny", *options)
    assert done.code == code
    assert said in done.out.splitlines()
    assert load_converted(run_here / "converted")


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse() -> None:
        raise UserError("--compile: no working C++ compiler (no g++)")

    monkeypatch.setattr(packages, "check_compiler", refuse)
    return "note: no compiled step: no working C++ compiler (no g++)"


def open_compiler_cache(monkeypatch: pytest.MonkeyPatch) -> str:
    Path("open").mkdir()
    Path("open").chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path("open").resolve()))
    return "the compiler's cache can be written by other users"


def no_records(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(packages, "can_remember", lambda: False)
    return "can't record that this machine compiled it"


def full_disk(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(packages, "available_memory", lambda: None)
    monkeypatch.setattr(packages, "COPIES", 1 << 50)
    return "MiB of free disk space"


def little_memory(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(packages, "available_memory", lambda: 1)
    return "GiB of memory, and 0.0 are free"


def test_free_memory_is_that_of_the_system_or_the_container(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert available_memory(tmp_path) == 7168
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    for limit, expected in (("max", 7168), ("3000", 2000), ("900", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert available_memory(tmp_path) == expected


@pytest.mark.parametrize("cause", [no_compiler, open_compiler_cache, no_records, full_disk, little_memory])
def test_machine_that_cannot_compile_is_one_note(
    cause: Any, run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiles_with(monkeypatch)
    said = cause(monkeypatch)
    done = script("convert", "runs/tiny")
    assert (done.code, done.err, made) == (0, "", [])
    (note,) = (line for line in done.out.splitlines() if line.startswith("note: no compiled step: "))
    assert said in note
    assert "compiling" not in done.out


def test_interrupted_compilation_keeps_the_complete_folder(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiles_with(monkeypatch, KeyboardInterrupt())
    stopped = script("convert", "runs/tiny")
    assert stopped.code == 130
    assert "runs/tiny/converted is complete but for compiled steps" in stopped.err
    assert stopped.err.endswith("convert.py runs/tiny/converted --compile float32\n")
    assert "perplexity" in stopped.out
    assert load_converted(run_here / "converted")


def test_steps_are_separated_by_blanks_or_commas(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiles_with(monkeypatch)
    assert script("convert", "runs/tiny", "--compile", "bfloat16,int8", "float32", "int8").code == 0
    assert made == ["bfloat16", "int8", "float32"]
    for wrong in ("float32,", "int4,float32", "runs/tiny"):
        with pytest.raises(UserError, match="is not one of float32, bfloat16, "):
            convert.parse(["--compile", wrong])
    assert_refused(script("convert", "--compile", "int8", "--no-compile"), "--no-compile", "--compile")


def test_batches_are_compiled_beside_the_steps_of_one_sequence(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiles_with(monkeypatch)
    done = script("convert", "runs/tiny", "--compile", "batch")
    assert (done.code, made) == (0, ["float32", "batch-float32"])
    assert "compiling the float32 batch decoding step" in done.out
    assert convert.parse(["--compile", "float16,bfloat16", "batch"]).compiled == (
        "float16",
        "bfloat16",
        "batch-bfloat16",
    )
    with pytest.raises(
        UserError, match="--compile batch: has no effect for float16 on this CPU; add float32"
    ):
        convert.parse(["--compile", "float16,batch"])
    assert packages.Packages(("float32", "batch-float32")).options == ["--compile", "float32", "batch"]
