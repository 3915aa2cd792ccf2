"""A failed compilation reports its cause: the disk, memory, the compiler, or a bug of this package."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest
import torch._inductor
from torch._inductor import config as inductor_config
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from tests.support.compilers import fake_compiler, needs_gxx
from tests.support.models import tiny_config
from tests.support.simulated import forget_probes
from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.conversion import convert_model
from tnnlm.errors import OS_ADVICE, UserError
from tnnlm.inference import aot as compiled
from tnnlm.inference.aot import compile_step
from tnnlm.models.causal_lm import CausalLM

FULL = OS_ADVICE[errno.ENOSPC]


def compile_tiny() -> None:
    model = convert_model(CausalLM(tiny_config(d_model=32, n_layers=1)).eval(), method="balanced")
    compile_step(model, Path("out"), "float32", model_fingerprint(model))


def compiler_failed(output: str, status: int = 1) -> Exception:
    error = CppCompileError(["g++", "a.cpp"], output)
    error.__cause__ = subprocess.CalledProcessError(status, ["g++", "a.cpp"])
    return error


def behind(error: Exception, cause: BaseException) -> Exception:
    error.__context__ = cause
    return error


FAILURES = {
    "disk": (OSError(errno.ENOSPC, "No space left on device"), FULL),
    "disk, named": (OSError(errno.ENOSPC, "No space left on device", "/t/a.cpp"), f"/t/a.cpp: {FULL}"),
    "disk, further behind": (behind(RuntimeError("writing failed"), OSError(errno.ENOSPC, "full")), FULL),
    "file size": (OSError(errno.EFBIG, "File too large"), "(ulimit -f)"),
    "memory": (MemoryError(), "out of memory"),
    "PyTorch's memory": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        "out of memory",
    ),
    "no compiler": (InvalidCxxCompiler(), "no working C++ compiler"),
    "source": (compiler_failed("In file a.h:\na.cpp:1: error: bad\n"), "failed: a.cpp:1: error: bad"),
    "compiler's disk": (compiler_failed("a.s: fatal error: x.o: No space left on device\n"), FULL),
    "compiler killed": (compiler_failed("", -9), "failed: killed by signal 9; is there enough memory?"),
    "compiler crashed": (compiler_failed("", -11), "failed: killed by signal 11"),
    "compiler's part killed": (
        compiler_failed("g++: fatal error: Killed signal terminated program cc1plus\n"),
        "failed: g++: fatal error: Killed signal terminated program cc1plus; is there enough memory?",
    ),
    "compiler's memory": (
        compiler_failed("cc1plus: out of memory allocating 65536 bytes\n"),
        "failed: cc1plus: out of memory allocating 65536 bytes; is there enough memory?",
    ),
}
"""Exceptions raised by the compilation, and the end of the error message for each."""


@pytest.mark.parametrize("case", FAILURES)
def test_the_cause_of_a_failure_is_reported(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, said = FAILURES[case]
    monkeypatch.setattr(compiled, "check_compiler", lambda: None)
    for raised in (inner, InductorError(inner, None)):

        def fail(*_: object, raised: BaseException = raised, **__: object) -> None:
            raise raised

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
        with pytest.raises(UserError) as caught:
            compile_tiny()
        assert str(caught.value).startswith("the step can't be compiled: ")
        assert str(caught.value).endswith(said)
        assert not list(Path("out").iterdir())


@pytest.mark.parametrize(
    "defect",
    [
        KeyError("a name"),
        InductorError(KeyError("a name"), None),
        behind(KeyError("a name"), FileNotFoundError(errno.ENOENT, "missing", "/cache/entry")),
    ],
)
def test_defect_keeps_its_traceback(defect: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise defect

    monkeypatch.setattr(compiled, "check_compiler", lambda: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(type(defect)) as caught:
        compile_tiny()
    assert caught.value is defect


@needs_gxx
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("kill -9 $$", "the C++ compiler failed: killed by signal 9; is there enough memory?"),
        ("echo 'g++: fatal error: x.o: No space left on device'; exit 1", FULL),
        ("echo 'omp.h:1: error: bad'; exit 1", "the C++ compiler failed: omp.h:1: error: bad"),
    ],
)
def test_compiler_that_fails_on_the_step_is_reported(
    end: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This compiler passes the probe, which builds a small library, and fails at the headers of PyTorch.
    script = f'case "$*" in *TORCH_INDUCTOR*) {end};; *) exec {shutil.which("g++")} "$@";; esac'
    name = str(fake_compiler(tmp_path / "g++", script))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    forget_probes()
    with inductor_config.patch({"cpp.cxx": (None, name)}), pytest.raises(UserError) as caught:
        compile_tiny()
    forget_probes()
    assert str(caught.value) == f"the step can't be compiled: {said}"
