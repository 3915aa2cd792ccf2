"""Decoding steps compiled ahead of time by AOTInductor (``convert.py --compile``), executed without Python.

The step of a single row is one loop nest: it calls no library, starts the threads once per token, and reads
the weights at memory bandwidth. The step of a batch multiplies by the matrices of the packed engine, updates
the states in place, and compiles to one loop nest between two products. Both are packages
(:mod:`tnnlm.inference.aot_package`) in the folder of the converted model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.errors import UserError
from tnnlm.inference.aot_package import (
    Run,
    check_compiler,
    check_compiler_cache,
    check_package,
    compile_package,
    load_package,
)
from tnnlm.inference.batch_step import BatchStep, batch_parts, ordered
from tnnlm.inference.flat_step import after_step, flat_step, parts_read
from tnnlm.inference.linear import replace_linears
from tnnlm.inference.linear_choice import choose_batch_linear, choose_linear
from tnnlm.inference.row_linear import row_linear
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import recurrences, shared_copy, use_channels_last
from tnnlm.ops.recurrence import work_ahead
from tnnlm.trust import NO_CODE, Trust

_CPU = torch.device("cpu")
_EXAMPLE_ROWS = 16
"""Rows of the example that a batch is compiled with."""
_MOST_ROWS = 1 << 16
"""Largest number of rows of a compiled batch."""


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
    """Model whose steps run in compiled packages, or in another function that takes and returns flat lists.

    ``model`` runs prompts, and batches if there is no package for them. The work of a step for later tokens
    follows it.
    """

    def __init__(self, model: CausalLM, row: Run, batch: Run | None = None) -> None:
        """Set up the model.

        Args:
            model: Converted model with packed linear layers.
            row: Step of a single row: a package, or :class:`tnnlm.models.row_step.RowStep`.
            batch: Package of the step of a batch; None lets ``model`` run it.
        """
        self.model = model
        self.embedding = model.embedding
        self.init_state = model.init_state
        self.prefill = model.prefill
        self.steps = model.steps
        self._row, self._batch = row, batch
        self._recurrences = recurrences(model)
        self._state: ModelState | None = None
        """State that the last step in place returned, whose parts are known."""
        self._parts: list[Tensor] = []

    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process one token per row; see :meth:`CausalLM.step`."""
        rows = tokens.shape[0]
        if active is None and rows == 1:
            # A package assumes contiguous inputs.
            outputs = self._row(tokens, *(part.contiguous() for part in parts_read(state)))
            return after_step(self._recurrences, state, outputs)
        if active is None and rows > 1 and self._batch is not None:
            return self.step_in_place(tokens, state.copy())
        return self.model.step(tokens, state, active)

    def step_in_place(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Process one token per row; ``state`` may be modified, and must not be used afterwards."""
        if tokens.shape[0] == 1 or self._batch is None:
            return self.step(tokens, state)
        if state is not self._state:
            state = ordered(state)
            self._parts = batch_parts(state)
        (logits,) = self._batch(tokens, *self._parts)
        layers = work_ahead(self._recurrences, state.layers)
        if any(after is not before for after, before in zip(layers, state.layers, strict=True)):
            self._state = ordered(ModelState(layers))
            self._parts = batch_parts(self._state)
        else:
            self._state = state
        return logits, self._state


def package_path(folder: Path, name: str) -> Path:
    """Return the path of a package.

    Args:
        folder: Folder of the converted model.
        name: Dtype of the weights for the step of a single row, or ``KIND-DTYPE``, such as batch-float32.
    """
    return folder / f"{name if '-' in name else f'step-{name}'}.pt2"


def has_step(folder: Path | None, dtype: str) -> bool:
    """Return whether a folder has a compiled step with weights of ``dtype``, wherever it was made."""
    return folder is not None and package_path(folder, dtype).is_file()


def compile_step(model: CausalLM, folder: Path, dtype: str, fingerprint: str) -> Path:
    """Compile the step of a single row into ``folder``, which takes up to a few minutes.

    Args:
        model: Converted model on the CPU with plain linear layers, which are replaced in place.
        folder: Folder of the converted model.
        dtype: Dtype of the weights.
        fingerprint: Hash of the model (:class:`tnnlm.checkpoints.converted.ConvertedModel`). The package is
            loaded for this model only.

    Returns:
        Path of the package.

    Raises:
        UserError: If there is no C++ compiler, ``fingerprint`` is that of another model, or as
            :func:`tnnlm.inference.aot_package.compile_package` does.
    """
    check_before_compiling(model, fingerprint)
    path = package_path(folder, dtype)
    function = _row_step(model, dtype)
    parts = [part.contiguous() for part in parts_read(model.init_state(1))]
    example = (torch.zeros(1, dtype=torch.long), *parts)
    compile_package(function, example, path, fingerprint)
    return path


def compile_batch(model: CausalLM, folder: Path, dtype: str, fingerprint: str) -> Path:
    """Compile the step of batches of any size from two rows on; see :func:`compile_step`.

    Raises:
        UserError: If the packed engine has no operator for this dtype that can be compiled, or as
            :func:`compile_step` does.
    """
    choice = choose_batch_linear(dtype)
    if choice is None:
        used = choose_linear(_CPU, dtype).name
        raise UserError(f"no compiled batch for {dtype}: its products by {used} can't be compiled here")
    check_before_compiling(model, fingerprint)
    use_linears(model, choice.make)
    path = package_path(folder, f"batch-{dtype}")
    rows = torch.export.Dim("rows", min=2, max=_MOST_ROWS)
    # Separate tensors, because inputs that share memory would be taken to depend on each other.
    views = batch_parts(ordered(model.init_state(_EXAMPLE_ROWS)))
    parts = [torch.empty_strided(part.shape, part.stride(), dtype=part.dtype).zero_() for part in views]
    example = (torch.zeros(_EXAMPLE_ROWS, dtype=torch.long), *parts)
    shapes = ({0: rows}, tuple({0: rows} for _ in parts))
    compile_package(BatchStep(model), example, path, fingerprint, shapes)
    return path


def compile_missing(
    model: CausalLM, folder: Path, dtype: str, fingerprint: str, report: Callable[[str], None]
) -> None:
    """Compile the steps of a single row and of batches, unless this machine compiled them before.

    The step of batches is omitted for dtypes whose products can't be compiled.

    Args:
        model: Converted model on the CPU with plain linear layers; it is not modified.
        folder: Folder of the converted model.
        dtype: Dtype of the weights.
        fingerprint: Hash of the model.
        report: Function that receives a line before each compilation.

    Raises:
        UserError: See :func:`compile_step`.
    """
    wanted = [(dtype, "one sequence", compile_step)]
    if choose_batch_linear(dtype) is not None:
        wanted.append((f"batch-{dtype}", "batches", compile_batch))
    for name, title, compile_rows in wanted:
        try:
            check_package(package_path(folder, name), fingerprint)
        except UserError:
            report(f"compiling the {dtype} decoding step of {title} ...")
            compile_rows(shared_copy(model), folder, dtype, fingerprint)


def load_row_step(model: CausalLM, folder: Path, dtype: str, fingerprint: str, trust: Trust = NO_CODE) -> Run:
    """Load the compiled step of a single row from the model's folder.

    Args:
        model: Converted model with plain linear layers, whose weights the package uses; it is not modified.
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
    return load_package(path, lambda: _row_step(shared_copy(model), dtype), fingerprint, trust)


def load_batch_step(
    packed: CausalLM, plain: CausalLM, folder: Path, dtype: str, fingerprint: str, trust: Trust = NO_CODE
) -> Run | None:
    """Load the compiled step of batches; None if there is none.

    A package is not used if TNNLM_WITHOUT disables its products, because the layers are others then.

    Args:
        packed: Model with the linear layers that :func:`choose_linear` selects, whose weights the package
            uses if its products take the same layers.
        plain: Same model with plain linear layers, whose weights are packed again otherwise.
        folder, dtype, fingerprint, trust: See :func:`load_row_step`, which raises the same exceptions.
    """
    path, choice = package_path(folder, f"batch-{dtype}"), choose_batch_linear(dtype)
    if choice is None or not path.is_file():
        return None
    shared = choice == choose_linear(_CPU, dtype)
    return load_package(
        path,
        lambda: BatchStep(packed if shared else use_linears(shared_copy(plain), choice.make)),
        fingerprint,
        trust,
    )


def check_before_compiling(model: CausalLM, fingerprint: str) -> None:
    """Check the compiler, its cache, and that a fingerprint is that of the model to be compiled.

    Raises:
        UserError: If there is no C++ compiler, others can write to its cache, or the fingerprint is that of
            another model. A folder may state such a hash, for which a package would then be recorded.
    """
    check_compiler()
    check_compiler_cache()
    if model_fingerprint(model) != fingerprint:
        raise UserError("config.json states the hash of another model", "convert again")


def use_linears(model: CausalLM, make: Callable[[Tensor, Tensor | None], nn.Module]) -> CausalLM:
    """Return ``model``, with its linear layers replaced in place by ``make(weight, bias)``."""
    replace_linears(model, make)
    use_channels_last(model)
    return model


def _row_step(model: CausalLM, dtype: str) -> _Step:
    """Return the step of a single row, with layers of ``model`` replaced in place."""
    return _Step(use_linears(model, lambda weight, bias: row_linear(weight, bias, dtype)))
