"""Packages of native code: functions of a converted model that AOTInductor compiled ahead of time.

A package has no weights: it refers to those of the model by name, so that all packages of a model share one
copy on disk and in memory. It is valid for one model, one version of PyTorch and one kind of CPU, which are
checked when it is loaded. It is native code, so it is loaded only if this machine compiled it, which a keyed
record in the user's cache says (:mod:`tnnlm.trust`), or if the user trusts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tnnlm.checksums import file_sha256
from tnnlm.errors import UserError, one_line
from tnnlm.files import atomic_file, cache_root, write_text
from tnnlm.machine.capabilities import capability, cpu_fingerprint, cpu_level
from tnnlm.machine.cpp_compiler import compile_failure
from tnnlm.reading import read_json
from tnnlm.trust import NO_CODE, Trust, is_own, remember, remembered

Run: TypeAlias = Callable[..., Sequence[Tensor]]
"""Function of a package: takes tensors, and returns tensors."""
_PACKAGE, _SIZE = "compiled step", "size of a compiled step"
"""Kinds of records. The size is compared first, so that a foreign package is refused without reading it."""
_FORMAT = "2"
"""Version of inputs and outputs of all packages; a package of another version would give wrong states."""
_TENSORS = "tensors"
"""Key of the hash of names, shapes and strides of the tensors in a package's metadata."""


def compile_package(
    function: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    fingerprint: str,
    dynamic_shapes: Any = None,
) -> None:
    """Compile a function of a model into a package, and record that this machine did so.

    :func:`check_compiler` and :func:`check_compiler_cache` must have passed.

    Args:
        function: Module without branches, which returns tensors.
        example: Inputs of the module. Those of a call must have the same shapes, apart from dynamic
            dimensions, and the same strides.
        path: Path of the package.
        fingerprint: Hash of the model (:class:`tnnlm.checkpoints.converted.ConvertedModel`).
        dynamic_shapes: Dimensions that vary, as :func:`torch.export.export` takes them.

    Raises:
        UserError: If the disk is full, memory runs out, or no record of the package can be written to the
            cache; the package is then kept.
    """
    from torch._inductor import aoti_compile_and_package

    with (
        torch.no_grad(),
        _threads_of_all_cpus(),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as scratch,
        atomic_file(path) as temporary,
    ):
        warnings.simplefilter("ignore")  # torch's compiler calls APIs that torch deprecates
        exported = torch.export.export(function.eval(), example, dynamic_shapes=dynamic_shapes)
        packaged = str(Path(scratch) / path.name)
        try:
            # Without freezing, which would widen bfloat16 and int8 weights to float32 at compile time.
            aoti_compile_and_package(
                exported,
                package_path=packaged,
                inductor_configs={
                    "aot_inductor.package_constants_in_so": False,
                    "aot_inductor.metadata": {_TENSORS: _layout(function)},
                },
            )
        except Exception as error:
            reason = compile_failure(error)
            if reason is None:  # a bug: keep the traceback
                raise
            raise UserError(f"the step can't be compiled: {reason[:200]}") from error
        shutil.copyfile(packaged, temporary)
        digest, size = file_sha256(Path(packaged)), temporary.stat().st_size
    made_for = _made_for(fingerprint)
    write_text(path.with_suffix(".json"), json.dumps(made_for, indent=2))
    known = remember(_SIZE, size=str(size), **made_for) and remember(_PACKAGE, sha256=digest, **made_for)
    if not known:
        raise UserError(
            f"{cache_root()}: can't record that this machine compiled {path}",
            "set TNNLM_CACHE to a private folder, or load the step with --trust-compiled",
        )


@contextmanager
def _threads_of_all_cpus() -> Iterator[None]:
    """Let PyTorch have as many threads as the system has CPUs.

    What it compiles then runs with the threads of the process that calls it. With another number, it always
    runs with the threads of the process that compiled it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_compiler() -> None:
    """Check that a C++ compiler works on this machine.

    Raises:
        UserError: If there is none.
    """
    found = capability("cpp_compiler")
    if not found:
        raise UserError(f"--compile: no working C++ compiler ({found.reason})")


def check_compiler_cache() -> None:
    """Check that the folder from which the compiler loads what it compiled before belongs to this user alone.

    Raises:
        UserError: If it belongs to another user or others can write to it, because it holds native code.
            The default is a folder of known name in the temporary folder, which anyone may have created.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())  # PyTorch creates it here if it doesn't exist
    if folder.is_dir() and not is_own(folder):
        raise UserError(
            f"{folder}: the compiler's cache can be written by other users",
            "set TORCHINDUCTOR_CACHE_DIR to a private folder",
        )


def check_package(path: Path, fingerprint: str, trust: Trust = NO_CODE) -> None:
    """Check, without reading it, that a package was compiled for this model on this machine.

    Raises:
        UserError: If there is no package, it doesn't fit this model, machine or version of PyTorch, or it is
            not trusted.
    """
    if not path.is_file():
        raise UserError("no compiled step", "create one with convert.py --compile")
    try:
        found = read_json(path.with_suffix(".json"), "", UserError)
    except UserError:
        found = {}
    expected = _made_for(fingerprint)
    if found.get("model_sha256", fingerprint) != fingerprint:
        raise UserError(
            "the compiled step belongs to another model", "recompile it with convert.py --compile"
        )
    if found != expected:
        raise UserError(
            "the compiled step is for another machine or PyTorch version",
            "recompile it with convert.py --compile",
        )
    if not trust.compiled and not remembered(_SIZE, size=str(path.stat().st_size), **expected):
        raise _foreign()


def load_package(path: Path, make: Callable[[], nn.Module], fingerprint: str, trust: Trust = NO_CODE) -> Run:
    """Load a package.

    Args:
        path: Path of the package.
        make: Returns what was compiled, and is called if the package may run. The package uses the tensors of
            that module.
        fingerprint: Hash of the model.
        trust: Whether a package that this machine didn't compile may run.

    Raises:
        UserError: See :func:`check_package`.
    """
    check_package(path, fingerprint, trust)
    with _private_copy(path) as (own, digest):
        if not trust.compiled and not remembered(_PACKAGE, sha256=digest, **_made_for(fingerprint)):
            raise _foreign()
        try:
            return _runner(own, make())
        except UserError:
            raise
        except Exception as error:  # the packed engine can run whatever the loader raises
            raise UserError(f"the compiled step can't be loaded ({one_line(error)[:80]})") from None


def _foreign() -> UserError:
    return UserError(
        "the compiled step is native code that was not compiled here",
        "recompile it with convert.py --compile, or load it with --trust-compiled",
    )


@contextmanager
def _private_copy(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield a copy that no one else can change, and its SHA-256: what was hashed is what is loaded.

    The loader extracts the package, so the copy isn't needed afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / path.name
        shutil.copyfile(path, own)
        yield own, file_sha256(own)


def _runner(path: Path, function: nn.Module) -> Run:
    """Return the package as a function that uses the tensors of ``function``.

    Calls torch's internal loader where its signature is as expected, because the public function first
    imports the whole compiler, which adds a second to the start-up.
    """
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        run: Callable[..., Any] = loader.run
    except (AttributeError, TypeError):
        from torch._inductor import aoti_load_package

        package = aoti_load_package(str(path))
        loader, run = package.loader, lambda inputs: package(*inputs)
    # The package reads tensors without any check.
    if loader.get_metadata().get(_TENSORS) != _layout(function):
        raise UserError(
            "the compiled step is for another version of tnnlm", "recompile it with convert.py --compile"
        )
    tensors = {name: attrgetter(name)(function).detach() for name in loader.get_constant_fqns()}
    loader.load_constants(tensors, False, True, True)
    return _Runner(run, tensors)


class _Runner:
    """Function of a package with the tensors that it refers to, which must live as long."""

    def __init__(self, run: Callable[[list[Tensor]], Sequence[Tensor]], tensors: dict[str, Tensor]) -> None:
        self._run, self._tensors = run, tensors

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self._run(list(inputs))


def _layout(function: nn.Module) -> str:
    """Return a hash of the names, shapes, strides and dtypes of the tensors of a module."""
    found = []
    for tensors in (function.named_parameters(), function.named_buffers()):
        for name, part in tensors:
            order = part.stride() if part.layout == torch.strided else part.layout
            found.append(f"{name} {tuple(part.shape)} {order} {part.dtype}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _made_for(fingerprint: str) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "model_sha256": fingerprint,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": cpu_level(),
        # The compiler targets every instruction set extension of this CPU.
        "cpu_instructions": cpu_fingerprint(),
    }
