"""What is timed: our models by conversion, engine and dtype, and models of ``transformers`` as their peers.

All have random weights: speed does not depend on them. Every subject offers a step at a context of a
given length, and a parallel pass over a prompt.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.onnx_runtime import OnnxModel
from experiments.peers import GPT2, Llama, Mamba, Peer
from experiments.timing import Stepper, Subject, random_tokens
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
PEERS: dict[str, type[Peer]] = {"llama": Llama, "gpt2": GPT2, "mamba": Mamba}


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

    def size(context: int) -> int:
        return state_bytes(decoder.init_state(1))

    read = partial(_read, decoder)
    step_at = partial(_step_at, decoder, shape.vocab_size)
    return Subject(f"tnnlm-{conversion}-{engine}", dtype, weights * WIDTHS[dtype], step_at, read, size)


def peer(kind: str, dtype: str, shape: ModelConfig, longest: int) -> Subject:
    """A model of ``transformers`` with about as many weights per token, and random ones.

    Args:
        kind: of ``PEERS``.
        dtype: float32 or bfloat16.
        shape: of our model, whose weights it is to have.
        longest: context that it must hold.

    Raises:
        UserError: if ``transformers`` is missing.
    """
    torch.manual_seed(0)
    own = peer_shape(kind, shape, longest)
    model = PEERS[kind](own).eval().to(getattr(torch, dtype)).requires_grad_(False)
    width = WIDTHS[dtype]

    def size(context: int) -> int:
        if kind == "mamba":
            config = model.net.config
            numbers = config.intermediate_size * (config.state_size + config.conv_kernel)
            return int(width * own.n_layers * numbers)
        return 2 * width * own.n_layers * own.d_model * context

    step_at = partial(_step_at, model, shape.vocab_size)
    read = partial(_read, model)
    name = f"transformers-{kind}"
    return Subject(name, dtype, linear_weights(model) * width, step_at, read, size, longest)


def peer_shape(kind: str, shape: ModelConfig, longest: int) -> ModelConfig:
    """Sizes with which a peer has as many weights per token as our model of sizes ``shape``."""
    width = shape.d_model
    own = replace(shape, max_length=longest + 8)
    rest = _block_weights(shape) - 4 * width * width  # of attention
    if kind == "gpt2":
        return replace(own, glu_dim=max(1, round(rest / (2 * width))))
    if kind == "mamba":
        inner, rank = 2 * width, max(1, width // 16)
        block = 3 * width * inner + inner * (2 * rank + 2 * Mamba.STATE)
        return replace(own, n_layers=max(1, round(shape.n_layers * _block_weights(shape) / block)))
    # A multiple of 32 for the block formats.
    return replace(own, glu_dim=max(32, 32 * round(rest / (96 * width))))


def _block_weights(shape: ModelConfig) -> int:
    """Of one of our layers: three products of the mixer, three of the GLU."""
    inner, hidden = shape.expand * shape.d_model, shape.glu_dim or shape.d_model
    return 3 * shape.d_model * (inner + hidden)


def _read(model: Any, prompt: Tensor) -> Any:
    """The state after a prompt (B, L)."""
    state = model.init_state(len(prompt))
    for chunk in prompt.split(CHUNK, dim=1):
        _, state = model.prefill(chunk, state, keep=1)
    return state


def _step_at(model: Any, vocabulary: int, batch: int, context: int) -> Stepper:
    prompt = random_tokens(1, context, vocabulary).expand(batch, -1)
    # Mamba's time does not depend on the context, and it reads prompts in a loop.
    state = _read(model, prompt[:, :8] if isinstance(model, Mamba) else prompt)
    # A recurrence's state is another tensor after a step: there is nothing to take back.
    undo = partial(model.undo, state) if isinstance(model, Peer) else None
    return Stepper(partial(model.step, torch.zeros(batch, dtype=torch.long), state), undo)


def _decoder(converted: ConvertedModel, folder: Path, dtype: str, engine: str) -> Any:
    if engine == "onnxruntime":
        return OnnxModel(converted, folder)
    return open_engine(converted, folder, dtype=dtype, engine=engine).generator.model


def linear_weights(model: Any) -> int:
    """How many numbers linear layers hold; a tied head counts with them, an embedding does not."""
    kinds = ("Linear", "Conv1D")
    return sum(m.weight.numel() for m in model.modules() if type(m).__name__ in kinds)
