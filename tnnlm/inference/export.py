"""Export of converted models for other runtimes: step and prefill by ``torch.export``, the step as ONNX.

The state is passed in and out as plain tensors and the batch dimension is dynamic. An exported program needs
torch or an ONNX runtime, but not this package. Each folder is self-contained, with the tokenizer and a
description of inputs and outputs. States and the arithmetic of the step are real numbers in float32.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_flatten, tree_unflatten

from tnnlm.checkpoints.converted import ConvertedModel
from tnnlm.errors import UserError, install_command
from tnnlm.files import atomic_folder, write_text
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import use_windows
from tnnlm.ops.toeplitz import fft_convolution

FORMAT = 1
"""Version of the schema of interface.json."""
FOLDERS = {"torch": Path("export"), "onnx": Path("onnx")}
"""Subfolder of the converted model for each export format."""
PREFILL_CHUNK = 64
"""Fixed number of tokens per call of the exported prefill; shorter chunks are padded."""
_INTERFACE = "interface.json"
_BATCH = "batch"
_FOLDED = 1 << 28
"""Largest constant to fold, in elements; the optimizer's default is smaller than one layer's constants."""
_ROWS = 2
"""Batch size of the example inputs; torch.export would specialise a batch of one as a constant."""


def export_torch(converted: ConvertedModel, folder: Path) -> Path:
    """Write step.pt2, prefill.pt2, interface.json and tokenizer.json to ``folder``/export.

    Args:
        converted: Converted model on the CPU, in float32, with plain linear layers.
        folder: Folder of the converted model.

    Returns:
        The folder, which is written atomically.
    """
    converted, target = _frozen(converted), folder / FOLDERS["torch"]
    functions = {"step": _Step(converted.model), "prefill": _Prefill(converted.model)}
    with atomic_folder(target) as temporary, _quiet():
        for name, function in functions.items():
            # Serialised in memory first, because torch's file writer aborts the process if the disk is full.
            program = io.BytesIO()
            torch.export.save(_program(function), program)
            (temporary / f"{name}.pt2").write_bytes(program.getbuffer())
        _describe(converted, temporary, functions)
    return target


def export_onnx(converted: ConvertedModel, folder: Path) -> Path:
    """Write step.onnx, interface.json and tokenizer.json to ``folder``/onnx.

    Takes the same arguments as :func:`export_torch` and returns the folder. Prefill is not exported, because
    it needs complex powers, which ONNX does not support.

    Raises:
        UserError: If the extra ``[onnx]`` isn't installed.
    """
    check_onnx()
    converted = _frozen(converted)
    function, target = _Step(converted.model), folder / FOLDERS["onnx"]
    with atomic_folder(target) as temporary, _quiet():
        program = torch.onnx.export(
            _program(function),
            dynamic_shapes=_shapes(function, _BATCH),
            input_names=[*function.inputs, *function.state],
            output_names=["logits", *(f"next_{name}" for name in function.state)],
            verbose=False,
        )
        assert program is not None
        from onnxscript.optimizer import optimize_ir

        # Folds the float64 poles into float32 constants: many runtimes have no float64.
        optimize_ir(program.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
        program.save(temporary / "step.onnx")
        _describe(converted, temporary, {"step": function})
    return target


def check_onnx() -> None:
    """Check that the packages for ONNX export are installed.

    Raises:
        UserError: If one is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: needs {' and '.join(missing)}", f"run: {install_command('onnx')}")


def _frozen(converted: ConvertedModel) -> ConvertedModel:
    """Return a copy that doesn't require gradients, so that the loaded program doesn't compute them.

    Its steps have no branches: ``multirate`` becomes a window, because an exported step would otherwise do
    the work of a whole turn for every token.
    """
    model = copy.deepcopy(converted.model).eval().requires_grad_(False)
    use_windows(model)
    return converted._replace(model=model)


class _Flat(nn.Module):
    """Model function that takes the state as a flat list of tensors, without empty ones."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        parts, self._structure = tree_flatten(model.init_state(_ROWS))
        self._kept = [bool(part.numel()) for part in parts]

    @property
    def state(self) -> dict[str, Tensor]:
        """Initial state: name -> tensor, without empty tensors."""
        layers = self.model.init_state(_ROWS).layers
        parts = {f"layer{i}_{name}": part for i, s in enumerate(layers) for name, part in s._asdict().items()}
        return {name: part for name, part in parts.items() if part.numel()}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Example inputs that precede the state: name -> tensor."""
        return {"tokens": torch.zeros(_ROWS, dtype=torch.long)}

    def _state(self, rows: int, parts: tuple[Tensor, ...]) -> ModelState:
        given = iter(parts)
        whole = tree_flatten(self.model.init_state(rows))[0]
        leaves = [next(given) if kept else part for part, kept in zip(whole, self._kept, strict=True)]
        return tree_unflatten(leaves, self._structure)

    def _outputs(self, logits: Tensor, state: ModelState) -> tuple[Tensor, ...]:
        parts = zip(tree_flatten(state)[0], self._kept, strict=True)
        return (logits, *(part.contiguous() for part, kept in parts if kept))


class _Step(_Flat):
    """Decoding step: (tokens (B,), state) -> (logits (B, V), state)."""

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return self._outputs(*self.model.step(tokens, self._state(tokens.shape[0], state)))


class _Prefill(_Flat):
    """Chunked prefill: (tokens (B, C), lengths (B,), state) -> (logits of the last tokens (B, V), state)."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {
            "tokens": torch.zeros(_ROWS, PREFILL_CHUNK, dtype=torch.long),
            "lengths": torch.full((_ROWS,), PREFILL_CHUNK),
        }

    def forward(self, tokens: Tensor, lengths: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, after = self.model.prefill(tokens, self._state(tokens.shape[0], state), lengths, keep=1)
        return self._outputs(logits[:, 0], after)


def _program(function: _Flat) -> ExportedProgram:
    """Export the function as a graph of built-in PyTorch operators."""
    example = (*function.inputs.values(), *function.state.values())
    with torch.no_grad():
        program = torch.export.export(function, example, dynamic_shapes=_shapes(function, Dim(_BATCH, min=1)))
        # Decomposes the package's custom operator, which other runtimes don't know.
        table: dict[Any, Callable[..., Any]] = {torch.ops.tnnlm.circular_conv.default: fft_convolution}
        return program.run_decompositions(table)


def _shapes(function: _Flat, batch: Any) -> dict[str, Any]:
    """Return dynamic shapes that mark the first dimension of every input as ``batch``."""
    free = {0: batch}
    state = {"state": tuple(free for _ in function.state)} if function.state else {}
    return {**dict.fromkeys(function.inputs, free), **state}


def _describe(converted: ConvertedModel, folder: Path, functions: Mapping[str, _Flat]) -> None:
    """Write interface.json and tokenizer.json."""
    model, tokenizer, fingerprint = converted
    data: dict[str, Any] = {
        "format": FORMAT,
        "model_sha256": fingerprint,
        "vocab_size": model.config.vocab_size,
        "tokenizer_size": tokenizer.size,
        "eos_id": tokenizer.eos_id,
    }
    for name, function in functions.items():
        data[name] = _interface(function)
    write_text(folder / _INTERFACE, json.dumps(data, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer.to_json())


def _interface(function: _Flat) -> dict[str, Any]:
    """Describe inputs and outputs in order: name, shape, dtype, initial state, and outputs to feed back."""
    inputs = [_tensor(name, part) for name, part in function.inputs.items()]
    state = [_tensor(name, part) | {"initial": 0.0} for name, part in function.state.items()]
    logits = {"name": "logits", "shape": [_BATCH, function.model.config.vocab_size], "dtype": "float32"}
    after = [_tensor(f"next_{name}", part) | {"feeds": name} for name, part in function.state.items()]
    return {"inputs": inputs + state, "outputs": [logits, *after]}


def _tensor(name: str, part: Tensor) -> dict[str, Any]:
    dtype = str(part.dtype).removeprefix("torch.")
    return {"name": name, "shape": [_BATCH, *part.shape[1:]], "dtype": dtype}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about deprecated APIs and optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
