"""What runs a converted model: a compiled step, packed weights, or its plain modules.

``packed`` replaces the linear layers and the head by those of :mod:`tnnlm.packed`; all else is the same
code. ``compiled`` runs single rows by the package that ``convert.py --compile`` made of ``step``
(:mod:`tnnlm.compiled`), batches and prompts packed. ``graph``, on a GPU, replays packed steps as a CUDA
graph (:mod:`tnnlm.graphs`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from tnnlm.compiled import CompiledModel, load_step
from tnnlm.converted import ConvertedModel
from tnnlm.errors import UserError
from tnnlm.generation import TextGenerator
from tnnlm.graphs import GraphedModel
from tnnlm.model import CausalLM
from tnnlm.packed import DTYPES, decoding_linear, replace_linears

ENGINES = ("auto", "compiled", "graph", "packed", "eager")
"""auto: the first that is there"""


class Engine(NamedTuple):
    """A generator, and in one line what runs it."""

    generator: TextGenerator
    line: str


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
    model = converted.model.to(where)
    if engine == "eager":
        if dtype != "float32":
            raise UserError("--engine eager: runs in float32 only; leave --dtype out")
        return Engine(TextGenerator(model, *converted[1:]), f"eager engine, {where.type}, float32")
    pack(model, dtype)
    found = _faster(model, folder, where, dtype, engine)
    if not isinstance(found, str):
        name = "graph" if isinstance(found, GraphedModel) else "compiled"
        return Engine(TextGenerator(found, *converted[1:]), f"{name} engine, {where.type}, {dtype}")
    if engine in ("compiled", "graph"):
        raise UserError(f"--engine {engine}: {found}")
    note = f" ({found})" if found else ""
    return Engine(TextGenerator(model, *converted[1:]), f"packed engine, {where.type}, {dtype}{note}")


def _faster(
    model: CausalLM, folder: Path | None, where: torch.device, dtype: str, engine: str
) -> CompiledModel | GraphedModel | str:
    """A compiled or a recorded step of a packed model, or in words why there is none."""
    if engine == "packed":
        return ""
    if where.type == "cpu":
        if engine == "graph":
            return "only on a GPU"
        return load_step(model, folder, dtype) if folder else "no folder to look for a compiled step in"
    if engine == "compiled":
        return "only on a CPU"
    try:
        return GraphedModel(model)
    except (RuntimeError, AssertionError) as error:  # what torch raises where there are no CUDA graphs
        return f"the step can't be recorded ({str(error).splitlines()[0][:80]})"


def pack(model: CausalLM, dtype: str = "float32") -> CausalLM:
    """Give a converted model fast linear layers and head, in place; returns it.

    Args:
        model: converted, on the device it will run on; it can't be saved afterwards.
        dtype: of the weights.

    Raises:
        UserError: for a dtype that this device has no operation for.
    """
    replace_linears(model, lambda weight, bias: decoding_linear(weight, bias, dtype))
    return model
