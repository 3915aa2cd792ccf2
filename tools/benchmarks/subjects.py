"""What is timed: our models by conversion, engine and dtype; their peers are in :mod:`benchmarks.peers`.

All have random weights: speed does not depend on them. Every subject offers a step at a context of a
given length, and a parallel pass over a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.onnx import OnnxModel
from tnnlm.checkpoints.converted import ConvertedModel
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import convert_model
from tnnlm.inference.aot import compile_step
from tnnlm.inference.engine import open_engine
from tnnlm.models.causal_lm import CausalLM, state_bytes
from tnnlm.tokenizer import train_bpe

SHAPE = ModelConfig(d_model=512, n_layers=6, vocab_size=10_240, max_length=512, glu_dim=512)
"""24.1M weights read per token"""
CONVERSIONS = {
    "balanced": {"method": "balanced"},
    "etsc512": {"method": "etsc", "horizon": 512},
    "window512": {"method": "window", "horizon": 512},
}
"""name -> settings of the conversion"""
CHUNK = 512
"""tokens that prompts are read in"""
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1}


class Stepper(NamedTuple):
    """One more token per row at a context, and what takes it back, outside the clock."""

    step: Callable[[], None]
    undo: Callable[[], None] = lambda: None


@dataclass
class Subject:
    """One model as it is timed."""

    name: str
    dtype: str
    weight_bytes: int
    """of linear layers and head, read for each token of one row"""
    step_at: Callable[[int, int], Stepper]
    """(batch, context) -> a step at that context"""
    prefill: Callable[[Tensor], None]
    """reads a prompt (1, L) from an empty state"""
    state_at: Callable[[int], int]
    """context -> bytes of state per sequence"""
    longest: int = 1 << 20
    """context that it can be asked for"""


def ours(conversion: str, engine: str, dtype: str, shape: ModelConfig, folder: Path) -> Subject:
    """A converted model of random weights.

    Args:
        conversion: one of ``CONVERSIONS``.
        engine: ``compiled``, ``packed``, ``eager`` or ``onnxruntime``; the first and the last compile or
            export into ``folder``.
        dtype: of the weights.
        shape: of the model.
        folder: for compiled steps.

    Raises:
        UserError: if there is no compiler, or no onnxruntime.
    """
    torch.manual_seed(0)
    model = convert_model(CausalLM(shape).eval(), **CONVERSIONS[conversion])  # type: ignore[arg-type]
    own = folder / conversion
    if engine == "compiled":
        compile_step(copy.deepcopy(model), own, dtype, "")
    weights = linear_weights(model) + model.embedding.weight.numel()
    tokenizer = train_bpe([" "], 257, "<eos>", 1, False)
    whole = ConvertedModel(model, tokenizer, "")
    decoder = _decoder(whole, own, dtype, engine)

    def step_at(batch: int, context: int) -> Stepper:
        state = decoder.init_state(batch)
        tokens = torch.zeros(batch, dtype=torch.long)
        for chunk in prompt_of(context, shape.vocab_size).expand(batch, -1).split(CHUNK, dim=1):
            _, state = decoder.prefill(chunk, state, keep=1)
        return Stepper(lambda: discard(decoder.step(tokens, state)))

    def prefill(prompt: Tensor) -> None:
        state = decoder.init_state(1)
        for chunk in prompt.split(CHUNK, dim=1):
            _, state = decoder.prefill(chunk, state, keep=1)

    def size(context: int) -> int:
        return state_bytes(decoder.init_state(1))

    return Subject(f"tnnlm-{conversion}-{engine}", dtype, weights * WIDTHS[dtype], step_at, prefill, size)


def _decoder(converted: ConvertedModel, folder: Path, dtype: str, engine: str) -> Any:
    if engine == "onnxruntime":
        return OnnxModel(converted, folder)
    return open_engine(converted, folder, dtype=dtype, engine=engine).generator.model


def linear_weights(model: Any) -> int:
    """How many numbers linear layers hold; a tied head counts with them, an embedding does not."""
    kinds = ("Linear", "Conv1D")
    return sum(m.weight.numel() for m in model.modules() if type(m).__name__ in kinds)


def prompt_of(length: int, vocabulary: int) -> Tensor:
    """Random token ids (1, ``length``)."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def discard(_: Any) -> None:
    """Nothing: what a step returns is not looked at."""
