"""What runs a converted model: a compiled step, packed weights, or its plain modules.

``packed`` replaces the linear layers and the head by the fastest that this machine has an operator for
(:mod:`tnnlm.inference.linear_choice`); all else is the same code. ``compiled`` runs single rows by the
package that ``convert.py --compile`` made of ``step`` (:mod:`tnnlm.inference.aot`), batches and prompts
packed. ``graph``, on a GPU, replays packed steps as a CUDA graph (:mod:`tnnlm.inference.cuda_graph`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tnnlm.checkpoints.converted import ConvertedModel
from tnnlm.errors import UserError
from tnnlm.inference.aot import CompiledModel, load_step
from tnnlm.inference.cuda_graph import GraphedModel
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.linear import DTYPES, cast_linear, replace_linears
from tnnlm.inference.linear_choice import Choice, choose_linear
from tnnlm.machine.capabilities import cpu_level
from tnnlm.models.causal_lm import CausalLM

ENGINES = ("auto", "compiled", "graph", "packed", "eager")
"""auto: the first that is there"""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What runs a model, and why nothing faster does; ``str()`` gives it in one line."""

    name: str
    """compiled, graph, packed or eager"""
    device: str
    dtype: str
    """of the weights of linear layers and head"""
    linear: str
    """operator of the linear layers, in batches and prompts also beside a compiled step"""
    batch_invariant: bool = False
    """whether a row has the same bits in any batch of two or more, as the server's batches are"""
    reason: str = ""
    """why no faster engine or operator was chosen; empty if there is none"""
    threads: int | None = None
    """of the CPU; None on other devices"""
    cpu_level: str | None = None
    """widest vector instructions that PyTorch uses; None on other devices"""

    def __str__(self) -> str:
        operator = f" by {self.linear}" if self.name == "packed" else ""
        note = f" ({self.reason})" if self.reason else ""
        return f"{self.name} engine, {self.device}, {self.dtype}{operator}{note}"


class Engine(NamedTuple):
    """A generator, and what runs it."""

    generator: TextGenerator
    info: EngineInfo


def open_engine(
    converted: ConvertedModel,
    folder: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    engine: str = "auto",
) -> Engine:
    """The fastest way to run a converted model.

    Args:
        converted: it is moved, and its layers are replaced: load another to have it as it was.
        folder: it was read from, where a compiled step is looked for.
        device: to run on.
        dtype: of the weights of linear layers and head: float32, bfloat16 or int8. Embedding, recurrences
            and states stay float32.
        engine: one of ``ENGINES``.

    Raises:
        UserError: for an engine or dtype that is unknown or can't be had.
    """
    where = torch.device(device)
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if engine == "eager" and dtype != "float32":
        raise UserError("--engine eager: runs in float32 only", "leave --dtype out")
    model = converted.model.to(where)
    runs: CausalLM | CompiledModel | GraphedModel = model
    if engine == "eager":
        name, choice, reasons = "eager", Choice("plain", cast_linear), []
    else:
        choice = choose_linear(where, dtype)
        replace_linears(model, choice.make)
        name, reasons = "packed", [choice.reason]
    if engine in ("auto", "compiled", "graph"):
        try:
            runs = _faster(model, folder, where, dtype, engine, converted.fingerprint)
            name, reasons = "graph" if isinstance(runs, GraphedModel) else "compiled", []
        except UserError as error:
            if engine != "auto":
                raise UserError(f"--engine {engine}: {error.reason}", error.remedy) from None
            reasons.append(str(error))
    info = EngineInfo(
        name=name,
        device=where.type,
        dtype=dtype,
        linear=choice.name,
        batch_invariant=name == "packed" and choice.batch_invariant,
        reason="; ".join(filter(None, reasons)),
        threads=torch.get_num_threads() if where.type == "cpu" else None,
        cpu_level=cpu_level() if where.type == "cpu" else None,
    )
    return Engine(TextGenerator(runs, converted.tokenizer, converted.fingerprint), info)


def _faster(
    model: CausalLM, folder: Path | None, where: torch.device, dtype: str, engine: str, fingerprint: str
) -> CompiledModel | GraphedModel:
    """A compiled or a recorded step of a packed model.

    Raises:
        UserError: if there is none, saying why.
    """
    if where.type == "cpu":
        if engine == "graph":
            raise UserError("only on a GPU")
        if folder is None:
            raise UserError("no folder to look for a compiled step in")
        return load_step(model, folder, dtype, fingerprint)
    if engine == "compiled":
        raise UserError("only on a CPU")
    try:
        return GraphedModel(model)
    except (RuntimeError, AssertionError) as error:  # what torch raises where there are no CUDA graphs
        raise UserError(f"the step can't be recorded ({str(error).splitlines()[0][:80]})") from None


def optimize_for_decoding(model: CausalLM, dtype: str = "float32") -> CausalLM:
    """Give a converted model the fastest linear layers and head for its device, in place; returns it.

    Args:
        model: converted, on the device it will run on; it can't be saved afterwards.
        dtype: of the weights.

    Raises:
        UserError: for a dtype that this device has no operator for.
    """
    replace_linears(model, choose_linear(model.embedding.weight.device, dtype).make)
    return model


def usable_device(name: str) -> torch.device:
    """A device by name; ``auto`` is a GPU if there is one.

    Raises:
        UserError: if it can't be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(name)
        torch.zeros(1, device=where).item()  # "meta" makes tensors without numbers
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return where
