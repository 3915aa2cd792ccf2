"""Decoding step compiled ahead of time by AOTInductor (``convert.py --compile``), executed without Python.

AOTInductor compiles the exported ``step`` for a single row into one loop nest: it calls no library, starts
the threads once per token, and reads the weights at memory bandwidth. The package is stored in the folder of
the converted model. It is valid for one version of PyTorch and one kind of CPU; both are checked when it is
loaded. It is native code, so it is loaded only if this machine compiled it, which a keyed record in the
user's cache says (:mod:`tnnlm.trust`), or if the user trusts it.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.checksums import file_sha256
from tnnlm.errors import UserError, one_line
from tnnlm.files import atomic_file, cache_root, write_text
from tnnlm.inference.flat_step import after_step, flat_step, parts_read
from tnnlm.inference.linear import replace_linears
from tnnlm.inference.row_linear import row_linear
from tnnlm.machine.capabilities import capability, cpu_fingerprint, cpu_level
from tnnlm.machine.cpp_compiler import compile_failure
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import recurrences
from tnnlm.reading import read_json
from tnnlm.trust import NO_CODE, Trust, is_own, remember, remembered

_PACKAGE, _SIZE = "compiled step", "size of a compiled step"
"""Kinds of records. The size is compared first, so that a foreign package is refused without reading it."""


class _Step(nn.Module):
    """Wrapper of ``step`` that takes the parts of the state that it reads as a list, as export requires.

    It returns the parts that a step changes, without the work for later tokens.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        logits, *changed = flat_step(self.model, tokens, self.model.init_state(1), parts)
        return (logits, *(part.contiguous() for part in changed))


class CompiledModel:
    """Model that runs single-row steps in the compiled package.

    ``model`` runs batches and prompts. The work of a step for later tokens follows it.
    """

    def __init__(self, model: CausalLM, run: Callable[..., Any]) -> None:
        self.model = model
        self.embedding = model.embedding
        self.init_state = model.init_state
        self.prefill = model.prefill
        self.steps = model.steps
        self._run = run
        self._recurrences = recurrences(model)

    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process one token per row; see :meth:`CausalLM.step`."""
        if tokens.shape[0] != 1 or active is not None:
            return self.model.step(tokens, state, active)
        # The package assumes contiguous inputs.
        outputs = self._run(tokens, *(part.contiguous() for part in parts_read(state)))
        return after_step(self._recurrences, state, outputs)


def package_path(folder: Path, dtype: str) -> Path:
    """Return the path of the compiled step with weights of ``dtype``."""
    return folder / f"step-{dtype}.pt2"


def has_step(folder: Path | None, dtype: str) -> bool:
    """Return whether a folder has a compiled step with weights of ``dtype``, wherever it was made."""
    return folder is not None and package_path(folder, dtype).is_file()


def compile_step(model: CausalLM, folder: Path, dtype: str, fingerprint: str) -> Path:
    """Compile ``step`` of a converted model into ``folder``, which takes up to a few minutes.

    Args:
        model: Converted model on the CPU with plain linear layers, which are replaced in place.
        folder: Folder of the converted model.
        dtype: Dtype of the weights.
        fingerprint: Hash of the model (:class:`tnnlm.checkpoints.converted.ConvertedModel`). The compiled
            step contains the weights, so it is loaded for this model only.

    Returns:
        Path of the package.

    Raises:
        UserError: If there is no C++ compiler, the disk is full, memory runs out, ``fingerprint`` is that of
            another model, or no record of the package can be written to the cache; the package is then kept.
    """
    check_compiler()
    check_compiler_cache()
    # A folder may state the hash of another model, for which this package would then be recorded.
    if model_fingerprint(model) != fingerprint:
        raise UserError("config.json states the hash of another model", "convert again")
    from torch._inductor import aoti_compile_and_package

    replace_linears(model, lambda weight, bias: row_linear(weight, bias, dtype))
    path = package_path(folder, dtype)
    example = (torch.zeros(1, dtype=torch.long), *parts_read(model.init_state(1)))
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as scratch,
        atomic_file(path) as temporary,
    ):
        warnings.simplefilter("ignore")  # torch's compiler calls APIs that torch deprecates
        exported = torch.export.export(_Step(model.eval()), example)
        packaged = str(Path(scratch) / path.name)
        try:
            # Without freezing, which would widen bfloat16 and int8 weights to float32 at compile time.
            aoti_compile_and_package(exported, package_path=packaged)
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
    return path


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


def load_step(
    model: CausalLM, folder: Path, dtype: str, fingerprint: str, trust: Trust = NO_CODE
) -> CompiledModel:
    """Load the compiled step of a model from the model's folder.

    Args:
        model: Converted model, which runs batches and prompts.
        folder: Folder of the converted model.
        dtype: Dtype of the weights.
        fingerprint: Hash of the weights in memory, before they are packed. That in config.json doesn't
            suffice, because a stranger may state the hash of a model that was compiled here.
        trust: Whether a step that this machine didn't compile may run.

    Raises:
        UserError: If there is no compiled step, it doesn't fit this model, machine or version of PyTorch, or
            it is not trusted.
    """
    path = package_path(folder, dtype)
    if not path.is_file():
        raise UserError("no compiled step", "create one with convert.py --compile")
    try:
        made_for = read_json(path.with_suffix(".json"), "", UserError)
    except UserError:
        made_for = {}
    expected = _made_for(fingerprint)
    if made_for.get("model_sha256", fingerprint) != fingerprint:
        raise UserError(
            "the compiled step belongs to another model", "recompile it with convert.py --compile"
        )
    if made_for != expected:
        raise UserError(
            "the compiled step is for another machine or PyTorch version",
            "recompile it with convert.py --compile",
        )
    foreign = UserError(
        "the compiled step is native code that was not compiled here",
        "recompile it with convert.py --compile, or load it with --trust-compiled",
    )
    if not trust.compiled and not remembered(_SIZE, size=str(path.stat().st_size), **expected):
        raise foreign
    with _private_copy(path) as (own, digest):
        if not trust.compiled and not remembered(_PACKAGE, sha256=digest, **expected):
            raise foreign
        try:
            return CompiledModel(model, _runner(own))
        except Exception as error:  # the packed engine can run whatever the loader raises
            raise UserError(f"the compiled step can't be loaded ({one_line(error)[:80]})") from None


@contextmanager
def _private_copy(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield a copy that no one else can change, and its SHA-256: what was hashed is what is loaded.

    The loader extracts the package, so the copy isn't needed afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / path.name
        shutil.copyfile(path, own)
        yield own, file_sha256(own)


def _runner(path: Path) -> Callable[..., Any]:
    """Return the package as a function.

    Calls torch's internal loader where its signature is as expected, because the public function first
    imports the whole compiler, which adds a second to the start-up.
    """
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except (AttributeError, TypeError):
        from torch._inductor import aoti_load_package

        return aoti_load_package(str(path))
    return lambda *inputs: loader.run(list(inputs))


def _made_for(fingerprint: str) -> dict[str, str]:
    return {
        "model_sha256": fingerprint,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": cpu_level(),
        # The compiler targets every instruction set extension of this CPU.
        "cpu_instructions": cpu_fingerprint(),
    }
