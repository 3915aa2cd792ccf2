"""Check that torch.compile finds a working C++ compiler, and explanations of compiler failures.

PyTorch uses ``CXX``, or g++ by default (clang++ on macOS, cl on Windows), as the name of one program. It
queries the version, joins each command to a string, splits that as a shell would, and runs it in another
folder. Options after the name, spaces in a path, and relative paths therefore fail, although they work in
other tools.
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
"""Timeout of a compiler process, in seconds."""
_MEMORY = re.compile("out of memory|memory exhausted|cannot allocate memory|killed", re.IGNORECASE)
"""Messages of compilers that run out of memory; the word killed comes from the system's OOM killer."""
_SOURCE = '#include <cmath>\nextern "C" float probe(float x) { return std::exp(x); }\n'


def check_cpp_compiler() -> None:
    """Compile a small function with the compiler that PyTorch selects.

    Raises:
        RuntimeError: If that fails; the message is the reason in one line.
    """
    for what, place in _places():
        if _words(place) != [place]:
            raise RuntimeError(
                f"{what}, {place}, has a space or quote in its path, where PyTorch can't compile"
            )
    name = _choose(compiler_names())
    target = "probe.dll" if _WINDOWS else "probe.so"
    options = ["/LD", f"/Fe{target}"] if _WINDOWS else ["-shared", "-fPIC", "-o", target]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(_SOURCE, encoding="ascii")
        _run([name, "probe.cpp", *options], folder)
        if not Path(folder, target).is_file():
            raise RuntimeError(f"{name}: produced no output file")


def compiler_names() -> list[str]:
    """Return the compilers that PyTorch tries in order; it uses the first that reports its version."""
    default = "cl" if _WINDOWS else "clang++" if sys.platform == "darwin" else "g++"
    loaded = sys.modules.get("torch._inductor.config")
    if _WINDOWS or loaded is None:
        return [os.environ.get("CXX", default)]
    # PyTorch read CXX when its compiler was imported, and a program may have changed the setting since.
    names = loaded.cpp.cxx
    return [name for name in (names if isinstance(names, list | tuple) else (names,)) if name is not None]


def complaint(output: str) -> str:
    """Return the most informative line of a compiler's output: the first error, otherwise the first line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")


def compile_failure(error: BaseException) -> str | None:
    """Return why torch.compile failed, in one line, if the cause is the machine or its C++ compiler.

    Args:
        error: Exception that PyTorch raised, with its chain of causes.

    Returns:
        Reason of the failure, or None for any other cause.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    for cause in _causes(error):
        if isinstance(cause, InvalidCxxCompiler):
            return "no working C++ compiler"
        if isinstance(cause, CppCompileError):
            return _compiler_failure(cause.output, cause.__cause__)
        # Python raises MemoryError, PyTorch a RuntimeError.
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return "out of memory"
        # A missing file may only be the reason why PyTorch tried the step that failed.
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, FileNotFoundError):
            place = f"{cause.filename}: " if cause.filename else ""
            return place + OS_ADVICE.get(cause.errno, os.strerror(cause.errno))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its chain of causes, the outermost first."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        context = None if following.__suppress_context__ else following.__context__
        following = getattr(following, "inner_exception", None) or following.__cause__ or context


def _compiler_failure(output: str, ended: BaseException | None) -> str:
    """Return the reason of a failure, from the compiler's output and exit code."""
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
    """Yield the folders whose paths PyTorch inserts into its commands without quotes, with a description."""
    yield "the temporary folder", tempfile.gettempdir().replace(os.sep, "/")
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        yield "TORCHINDUCTOR_CACHE_DIR", os.environ["TORCHINDUCTOR_CACHE_DIR"].replace(os.sep, "/")
    if not _WINDOWS:
        yield "PyTorch's folder", str(Path(torch.__file__).parent)


def _choose(names: list[str]) -> str:
    """Return the first compiler that runs.

    Raises:
        RuntimeError: If no compiler runs, or PyTorch can't use the path of the first one that does.
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
            raise RuntimeError(f"{name}: PyTorch can't run a path with a space or quote, use a symbolic link")
        if os.path.dirname(name) and not os.path.isabs(name):
            raise RuntimeError(f"{name}: PyTorch runs it in another folder, use an absolute path")
        return name
    raise RuntimeError("; ".join(refusals) or "torch._inductor.config.cpp.cxx: contains no compiler")


def _check_answers(name: str) -> None:
    """Run a compiler for its version, as PyTorch does before selecting it.

    Raises:
        RuntimeError: If PyTorch would reject the compiler.
    """
    if not name.strip():
        raise RuntimeError("CXX: is empty, unset it or set it to a compiler")
    try:
        _run([name, "/help" if _WINDOWS else "--version"], None)
    except FileNotFoundError:
        if len(_words(name)) > 1:
            raise RuntimeError(f"{name}: PyTorch needs the name of one program, without options") from None
        raise RuntimeError(f"{name}: not found, install g++ or set CXX to a compiler") from None
    except OSError as error:
        raise RuntimeError(f"{name}: {error.strerror}") from None
    except RuntimeError:
        if not _WINDOWS:  # PyTorch runs it for its help on Windows and ignores the exit code
            raise


def _words(text: str) -> list[str]:
    """Split a command as PyTorch does; return an empty list for an unclosed quote."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def _run(command: list[str], folder: str | None) -> None:
    """Run a command.

    Args:
        command: Program and arguments.
        folder: Working folder; None for the current one.

    Raises:
        OSError: If the command can't be started.
        RuntimeError: If the command fails or exceeds the timeout; the message contains the reason.
    """
    # Use a separate process group to kill the compiler's child processes as well.
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
        except BaseException as error:  # including Ctrl-C, which doesn't reach another process group
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if own_group else process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RuntimeError(f"{command[0]}: did not finish within the timeout") from None
    if process.returncode:
        raise RuntimeError(f"{command[0]}: {complaint(output) or f'exit code {process.returncode}'}")
