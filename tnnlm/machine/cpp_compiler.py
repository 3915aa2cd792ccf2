"""Whether PyTorch's compiler has a C++ compiler here, tried as PyTorch will run it, and what made it fail.

PyTorch takes ``CXX``, else g++ (on macOS clang++, on Windows cl), for the name of one program, asks it for
its version, writes each command as one line, splits that as a shell would, and runs it in another folder.
Options beside the name, a blank in a path, or a path from the current folder work elsewhere, and fail there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tnnlm.errors import OS_ADVICE

_WINDOWS = sys.platform == "win32"
_SECONDS = 60.0
"""after which a compiler is given up"""
_MEMORY = re.compile("out of memory|memory exhausted|cannot allocate memory|killed", re.IGNORECASE)
"""what compilers say when there is too little, the last of those that the system ends for it"""
_SOURCE = '#include <cmath>\nextern "C" float probe(float x) { return std::exp(x); }\n'


def check_cpp_compiler() -> None:
    """Compile a function with the compiler that PyTorch will take.

    Raises:
        RuntimeError: if that fails, saying why in one line.
    """
    for what, place in _places():
        if _words(place) != [place]:
            raise RuntimeError(
                f"{what}, {place}, has a blank or quote in its path: PyTorch can't compile there"
            )
    name = _choose(compiler_names())
    target = "probe.dll" if _WINDOWS else "probe.so"
    options = ["/LD", f"/Fe{target}"] if _WINDOWS else ["-shared", "-fPIC", "-o", target]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(_SOURCE, encoding="ascii")
        _run([name, "probe.cpp", *options], folder)
        if not Path(folder, target).is_file():
            raise RuntimeError(f"{name}: compiles nothing")


def compiler_names() -> list[str]:
    """The compilers that PyTorch tries, in this order, of which it takes the first that tells its version."""
    default = "cl" if _WINDOWS else "clang++" if sys.platform == "darwin" else "g++"
    loaded = sys.modules.get("torch._inductor.config")
    if _WINDOWS or loaded is None:
        return [os.environ.get("CXX", default)]
    # CXX was read when PyTorch's compiler was loaded, and a program may have chosen otherwise since.
    names = loaded.cpp.cxx
    return [name for name in (names if isinstance(names, list | tuple) else (names,)) if name is not None]


def complaint(output: str) -> str:
    """The line of a compiler's output that says what is wrong: the first error, else the first line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")


def compile_failure(error: BaseException) -> str | None:
    """Why PyTorch's compiler gave up, in one line, or None if that is neither the machine nor its compiler.

    Args:
        error: as PyTorch raised it, around what happened.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    for cause in _causes(error):
        if isinstance(cause, InvalidCxxCompiler):
            return "no working C++ compiler"
        if isinstance(cause, CppCompileError):
            return _compiler_failure(cause.output, cause.__cause__)
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):  # Python's, PyTorch's
            return "out of memory"
        # A file that is missing may only be why PyTorch went on to what failed.
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, FileNotFoundError):
            place = f"{cause.filename}: " if cause.filename else ""
            return place + OS_ADVICE.get(cause.errno, os.strerror(cause.errno))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it, the outermost first."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        context = None if following.__suppress_context__ else following.__context__
        following = getattr(following, "inner_exception", None) or following.__cause__ or context


def _compiler_failure(output: str, ended: BaseException | None) -> str:
    """What a compiler's output and end say."""
    if os.strerror(errno.ENOSPC) in output:
        return OS_ADVICE[errno.ENOSPC]
    status = ended.returncode if isinstance(ended, subprocess.CalledProcessError) else 0
    said = complaint(output) or f"exit code {status}"
    if status < 0:
        said = f"killed by signal {-status}"
    if status == -9 or _MEMORY.search(output):
        said += "; is there enough memory?"
    return f"the C++ compiler failed: {said}"


def _places() -> Iterator[tuple[str, str]]:
    """Folders whose paths PyTorch writes into its commands without quotes."""
    yield "the temporary folder", tempfile.gettempdir().replace(os.sep, "/")
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        yield "TORCHINDUCTOR_CACHE_DIR", os.environ["TORCHINDUCTOR_CACHE_DIR"].replace(os.sep, "/")
    if not _WINDOWS:
        yield "PyTorch's folder", str(Path(torch.__file__).parent)


def _choose(names: list[str]) -> str:
    """The first that answers.

    Raises:
        RuntimeError: if none does, or PyTorch can't run what does.
    """
    refusals = []
    for name in names:
        try:
            _check_answers(name)
        except RuntimeError as refusal:
            refusals.append(str(refusal))
            continue
        path = name.replace(os.sep, "/")
        if _words(path) != [path]:
            raise RuntimeError(f"{name}: PyTorch can't run a path with a blank or quote, name a link to it")
        if os.path.dirname(name) and not os.path.isabs(name):
            raise RuntimeError(f"{name}: PyTorch runs it in another folder, name the whole path")
        return name
    raise RuntimeError("; ".join(refusals) or "torch._inductor.config.cpp.cxx names no compiler")


def _check_answers(name: str) -> None:
    """Start a compiler as PyTorch does before it takes it.

    Raises:
        RuntimeError: if PyTorch will not take it.
    """
    if not name.strip():
        raise RuntimeError("CXX is empty: unset it or name a compiler")
    try:
        _run([name, "/help" if _WINDOWS else "--version"], None)
    except FileNotFoundError:
        if len(_words(name)) > 1:
            raise RuntimeError(f"{name}: PyTorch takes the name of one program, without options") from None
        raise RuntimeError(f"{name}: not found, install g++ or name a compiler in CXX") from None
    except OSError as error:
        raise RuntimeError(f"{name}: {error.strerror}") from None
    except RuntimeError:
        if not _WINDOWS:  # there it is started for its help, whatever it makes of that
            raise


def _words(text: str) -> list[str]:
    """As PyTorch splits its commands; none if a quote has no end."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def _run(command: list[str], folder: str | None) -> None:
    """Run a command.

    Raises:
        OSError: if it can't be started.
        RuntimeError: if it fails or does not end, saying why.
    """
    # In a group of its own: a compiler starts others, which would outlive it.
    own_group = hasattr(os, "killpg")
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=own_group,
    ) as process:
        try:
            output = process.communicate(timeout=_SECONDS)[0].decode(errors="replace")
        except BaseException as error:  # Ctrl-C, too, which doesn't reach another group
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if own_group else process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RuntimeError(f"{command[0]}: does not answer") from None
    if process.returncode:
        raise RuntimeError(f"{command[0]}: {complaint(output) or f'exit code {process.returncode}'}")
