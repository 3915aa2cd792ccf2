"""A decoding step compiled ahead of time: made by ``convert.py --compile``, run without Python in between.

``step`` for a single row is exported and compiled by AOTInductor, which makes one loop nest of it: no
library is called, the threads are started once per token, and weights are read at the memory's speed. The
package stands beside the converted model; it holds for one version of PyTorch and one kind of
processor, which it is checked for.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tnnlm.errors import UserError, one_line
from tnnlm.files import atomic_file, write_text
from tnnlm.inference.linear import replace_linears
from tnnlm.inference.row_linear import row_linear
from tnnlm.machine.capabilities import capability, cpu_fingerprint, cpu_level
from tnnlm.machine.cpp_compiler import compile_failure
from tnnlm.models.causal_lm import CausalLM, ModelState


class _Step(nn.Module):
    """``step`` with the state as a flat row of tensors, as export wants it."""

    def __init__(self, model: CausalLM, structure: TreeSpec) -> None:
        super().__init__()
        self.model = model
        self.structure = structure

    def forward(self, tokens: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        logits, state = self.model.step(tokens, tree_unflatten(list(parts), self.structure))
        return (logits, *(part.contiguous() for part in tree_flatten(state)[0]))


class CompiledModel:
    """A model whose single rows step by the package; batches and prompts go to ``model``."""

    def __init__(self, model: CausalLM, run: Callable[..., Any]) -> None:
        self.model = model
        self.embedding = model.embedding
        self.init_state = model.init_state
        self.prefill = model.prefill
        self._run = run
        self._forms = [type(layer) for layer in model.init_state(1).layers]

    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """As :meth:`CausalLM.step`."""
        if tokens.shape[0] != 1 or active is not None:
            return self.model.step(tokens, state, active)
        # The package takes the strides of its inputs for granted. By hand: pytrees take a tenth of a
        # millisecond per token.
        outputs = iter(self._run(tokens, *(part.contiguous() for layer in state.layers for part in layer)))
        logits = next(outputs)
        layers = tuple(form(*(next(outputs) for _ in form._fields)) for form in self._forms)
        return logits, ModelState(layers)


def package_path(folder: Path, dtype: str) -> Path:
    """Of the step with weights of ``dtype``."""
    return folder / f"step-{dtype}.pt2"


def compile_step(model: CausalLM, folder: Path, dtype: str, fingerprint: str) -> Path:
    """Compile ``step`` of a converted model into ``folder``; minutes at the most.

    Args:
        model: converted, unpacked, on the CPU; its linear layers are replaced.
        folder: of the converted model.
        dtype: of the weights.
        fingerprint: of the model (:class:`tnnlm.checkpoints.converted.ConvertedModel`): the step holds its
            weights, and runs for no other.

    Raises:
        UserError: if there is no C++ compiler, or the machine fails it: a full disk, too little memory.
    """
    check_compiler()
    from torch._inductor import aoti_compile_and_package

    replace_linears(model, lambda weight, bias: row_linear(weight, bias, dtype))
    parts, structure = tree_flatten(model.init_state(1))
    path = package_path(folder, dtype)
    example = (torch.zeros(1, dtype=torch.long), *parts)
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as scratch,
        atomic_file(path) as temporary,
    ):
        warnings.simplefilter("ignore")  # torch's compiler uses what torch itself deprecates
        exported = torch.export.export(_Step(model.eval(), structure), example)
        packaged = str(Path(scratch) / path.name)
        try:
            # Not frozen: the compiler would widen narrow weights once and for all.
            aoti_compile_and_package(exported, package_path=packaged)
        except Exception as error:
            reason = compile_failure(error)
            if reason is None:  # a defect, which keeps its traceback
                raise
            raise UserError(f"the step can't be compiled: {reason[:200]}") from error
        shutil.copyfile(packaged, temporary)
    write_text(path.with_suffix(".json"), json.dumps(_made_for(fingerprint), indent=2))
    return path


def check_compiler() -> None:
    """Whether steps can be compiled here.

    Raises:
        UserError: if there is no C++ compiler, saying what to do.
    """
    found = capability("cpp_compiler")
    if not found:
        raise UserError(f"--compile: no working C++ compiler ({found.reason})")


def load_step(model: CausalLM, folder: Path, dtype: str, fingerprint: str) -> CompiledModel:
    """The model of this fingerprint with its compiled step.

    Raises:
        UserError: if there is none that can be used here, saying why.
    """
    path = package_path(folder, dtype)
    if not path.is_file():
        raise UserError("no compiled step", "convert.py --compile makes one")
    try:
        made_for = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made_for = None
    expected = _made_for(fingerprint)
    if isinstance(made_for, dict) and made_for.get("model_sha256", fingerprint) != fingerprint:
        raise UserError("the compiled step is of another model", "convert.py --compile makes a new one")
    if made_for != expected:
        raise UserError(
            "the compiled step is for another machine or PyTorch", "convert.py --compile makes a new one"
        )
    try:
        return CompiledModel(model, _runner(path))
    except Exception as error:  # whatever the loader raises, the plain engine runs
        raise UserError(f"the compiled step can't be loaded ({one_line(error)[:80]})") from None


def _runner(path: Path) -> Callable[..., Any]:
    """The package as a function. By torch's loader itself, where it is as known: the public function
    imports the whole compiler first, a second of the start-up."""
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
        # The compiler uses every instruction that it finds.
        "cpu_instructions": cpu_fingerprint(),
    }
