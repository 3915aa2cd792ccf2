"""Inference engines for converted models: compiled, graph, packed and eager.

``eager`` runs the model's PyTorch modules. ``packed`` replaces the linear layers and the head with the
fastest operator available on this machine (:mod:`tnnlm.inference.linear_choice`), and on a CPU runs the step
of a single row with fewer operators (:mod:`tnnlm.models.row_step`). ``compiled`` runs steps in the packages
that ``convert.py --compile`` creates (:mod:`tnnlm.inference.aot`), and prompts, as well as batches for which
there is no package, with packed weights. ``graph`` replays packed steps as a CUDA graph on a GPU
(:mod:`tnnlm.inference.cuda_graph`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tnnlm.checkpoints.converted import ConvertedModel, model_fingerprint
from tnnlm.errors import UserError, one_line
from tnnlm.inference.aot import CompiledModel, has_step, load_batch_step, load_row_step
from tnnlm.inference.aot_package import Run
from tnnlm.inference.cuda_graph import GraphedModel
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.linear import DTYPES, cast_linear, replace_linears
from tnnlm.inference.linear_choice import Choice, choose_linear
from tnnlm.machine.capabilities import cpu_level
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.row_step import RowStep
from tnnlm.models.surgery import shared_copy, use_channels_last
from tnnlm.ops.fused import why_not_fused
from tnnlm.trust import NO_CODE, Trust

ENGINES = ("auto", "compiled", "graph", "packed", "eager")
"""Engines that can be selected; ``auto`` is the fastest available."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Description of the selected engine, and why no faster one runs; ``str()`` gives it in one line."""

    name: str
    """Name of the engine: compiled, graph, packed or eager."""
    device: str
    """Type of the device, such as cpu or cuda."""
    dtype: str
    """Dtype of the weights of linear layers and head."""
    linear: str
    """Operator of the linear layers; the compiled engine uses it for batches and prompts."""
    batch_invariant: bool = False
    """Whether a row's outputs are bitwise identical in any batch of two or more rows, as in the server
    with ``--reproducible``."""
    compiled_batches: bool = False
    """Whether batches run in a compiled package."""
    reason: str = ""
    """Why no faster engine or operator was selected; empty if there is none."""
    threads: int | None = None
    """Number of CPU threads; None on other devices."""
    cpu_level: str | None = None
    """Widest vector instruction set that PyTorch uses on the CPU; None on other devices."""

    def __str__(self) -> str:
        operator = f" by {self.linear}" if self.name == "packed" else ""
        batches = ", also for batches" if self.compiled_batches else ""
        note = f" ({self.reason})" if self.reason else ""
        return f"{self.name} engine, {self.device}, {self.dtype}{operator}{batches}{note}"


class Engine(NamedTuple):
    """Text generator with a description of the engine that runs it."""

    generator: TextGenerator
    info: EngineInfo


def open_engine(
    converted: ConvertedModel,
    folder: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    engine: str = "auto",
    trust: Trust = NO_CODE,
) -> Engine:
    """Open a converted model with the requested engine, by default the fastest available.

    Args:
        converted: Converted model; it is moved to the device and its layers are replaced in place.
        folder: Folder that the model was loaded from, which may contain compiled steps.
        device: Device to run on.
        dtype: Dtype of the weights of linear layers and head: float32, bfloat16, float16 or int8.
            Embedding, recurrences and states stay in float32.
        engine: One of ``ENGINES``.
        trust: Whether a compiled step that this machine didn't make may run.

    Raises:
        UserError: If an engine or dtype is unknown, or not available on this machine.
    """
    where = torch.device(device)
    _check_request(engine, dtype)
    model = converted.model.to(where)
    # Before the layers are replaced: what was compiled for other weights must not run with these.
    made_for = converted.fingerprint
    if where.type == "cpu" and engine in ("auto", "compiled") and has_step(folder, dtype):
        made_for = model_fingerprint(model)
    eager, fast = engine == "eager", engine in ("auto", "compiled", "graph")
    choice = Choice("plain", cast_linear) if eager else choose_linear(where, dtype)
    name, reasons = "eager" if eager else "packed", [choice.reason]
    runs: CausalLM | CompiledModel | GraphedModel = model
    row = None
    if fast and where.type == "cpu":
        with _reported(engine, reasons):
            row = _compiled_row(model, folder, dtype, engine, made_for, trust)
    plain = shared_copy(model) if row is not None else model
    if not eager:
        replace_linears(model, choice.make)
    if where.type == "cpu":
        use_channels_last(model)
    batch = None
    if row is not None and folder is not None:
        name, reasons = "compiled", []
        with _reported(engine, reasons):
            batch = load_batch_step(model, plain, folder, dtype, made_for, trust)
        runs = CompiledModel(model, row, batch)
    elif not eager and where.type == "cpu" and RowStep.covers(model):
        runs = CompiledModel(model, RowStep(model))
    elif fast and where.type != "cpu":
        with _reported(engine, reasons):
            runs = _graphed(model, where, engine)
            name, reasons = "graph", []
            if missing := why_not_fused(where):
                reasons.append(f"no fused operators: {missing}")
    info = _describe(name, where, dtype, choice, reasons, compiled_batches=batch is not None)
    return Engine(TextGenerator(runs, converted.tokenizer, converted.fingerprint), info)


@contextmanager
def _reported(engine: str, reasons: list[str]) -> Iterator[None]:
    """Add the reason why an engine is not available to ``reasons``, or raise it if the engine was requested.

    Raises:
        UserError: If ``engine`` is not auto, and is not available.
    """
    try:
        yield
    except UserError as error:
        if engine != "auto":
            raise UserError(f"--engine {engine}: {error.reason}", error.remedy) from None
        reasons.append(str(error))


def _check_request(engine: str, dtype: str) -> None:
    """Check the names of an engine and a dtype, and that they go together.

    Raises:
        UserError: If they don't.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if engine == "eager" and dtype != "float32":
        raise UserError("--engine eager: runs in float32 only", "omit --dtype")


def _describe(
    name: str,
    where: torch.device,
    dtype: str,
    choice: Choice,
    reasons: list[str],
    compiled_batches: bool,
) -> EngineInfo:
    """Return the description of an engine that was selected for these reasons, of which some are empty."""
    return EngineInfo(
        name=name,
        device=where.type,
        dtype=dtype,
        linear=choice.name,
        batch_invariant=name in ("packed", "compiled") and choice.batch_invariant,
        compiled_batches=compiled_batches,
        reason="; ".join(filter(None, reasons)),
        threads=torch.get_num_threads() if where.type == "cpu" else None,
        cpu_level=cpu_level() if where.type == "cpu" else None,
    )


def _compiled_row(
    model: CausalLM, folder: Path | None, dtype: str, engine: str, fingerprint: str, trust: Trust
) -> Run:
    """Return the compiled step of a single row on the CPU, before the linear layers of ``model`` are packed.

    Raises:
        UserError: If it is not available.
    """
    if engine == "graph":
        raise UserError("needs a GPU", "use another engine, or add --device cuda on a machine with a GPU")
    if folder is None:
        raise UserError(
            "no compiled step, because the model was not loaded from a folder",
            "convert it with convert.py --compile, and load that folder",
        )
    return load_row_step(model, folder, dtype, fingerprint, trust)


def _graphed(model: CausalLM, where: torch.device, engine: str) -> GraphedModel:
    """Return a CUDA graph of a packed model on a GPU.

    Raises:
        UserError: If it is not available.
    """
    if engine == "compiled":
        raise UserError("needs a CPU", "use another engine, or add --device cpu")
    try:
        return GraphedModel(model, fused=not why_not_fused(where))
    except (RuntimeError, AssertionError) as error:  # raised by torch where CUDA graphs are not supported
        raise UserError(f"the CUDA graph can't be captured ({str(error).splitlines()[0][:80]})") from None


def optimize_for_decoding(model: CausalLM, dtype: str = "float32") -> CausalLM:
    """Replace a converted model's linear layers and head in place with the fastest ones for its device.

    Args:
        model: Converted model on the device that it will run on; it can't be saved afterwards.
        dtype: Dtype of the weights.

    Returns:
        Model with replaced layers, the one that was passed in.

    Raises:
        UserError: If the device has no operator for this dtype.
    """
    where = model.embedding.weight.device
    replace_linears(model, choose_linear(where, dtype).make)
    if where.type == "cpu":
        use_channels_last(model)
    return model


def usable_device(name: str) -> torch.device:
    """Return a device by name; ``auto`` is a GPU if there is one.

    Raises:
        UserError: If the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    shown = f"--device {name if name.isprintable() else repr(name)}"
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    remedy = f"use {' or '.join([', '.join(['auto', *gpus]), 'cpu'])}"
    try:
        where = torch.device(name)
    except RuntimeError:  # its message lists devices that need other builds of PyTorch
        raise UserError(f"{shown}: is no name of a device", remedy) from None
    try:
        # Poles are float64, which Apple's GPU lacks, and tensors on "meta" have no data.
        torch.zeros(1, dtype=torch.float64, device=where).item()
    except Exception as error:  # such as ModuleNotFoundError for a device of a plugin
        sentence = one_line(error).partition(": ")[2].partition(". ")[0]
        raise UserError(f"{shown}: can't be used here ({sentence})", remedy) from None
    return where
