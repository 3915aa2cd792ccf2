"""Models to measure: converted models by method, engine and dtype, and baselines of ``transformers``.

All have random weights, because speed does not depend on them. Every subject offers a decoding step at a
given context length and a parallel prefill.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.onnx_runtime import OnnxModel
from experiments.peers import GPT2, Llama, Mamba, Peer
from experiments.timing import Stepper, Subject, random_tokens
from tnnlm.checkpoints.converted import ConvertedModel, model_fingerprint
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import convert_model
from tnnlm.inference.aot import CompiledModel, compile_missing
from tnnlm.inference.decoder import DecoderModel
from tnnlm.inference.engine import open_engine
from tnnlm.models.causal_lm import CausalLM, ModelState, state_bytes
from tnnlm.tokenizer import train_bpe

SHAPE = ModelConfig(d_model=512, n_layers=6, vocab_size=10_240, max_length=512, glu_dim=512)
"""Configuration of the converted models; 24.1M weights are read per token."""
CONVERSIONS = {
    "balanced": {"method": "balanced"},
    "etsc512": {"method": "etsc", "horizon": 512},
    "window512": {"method": "window", "horizon": 512},
}
"""Settings of the conversions by name."""
CHUNK = 512
"""Tokens per prefill chunk."""
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes per weight by dtype."""
PEERS: dict[str, type[Peer]] = {"llama": Llama, "gpt2": GPT2, "mamba": Mamba}


def ours(conversion: str, engine: str, dtype: str, shape: ModelConfig, folder: Path) -> Subject:
    """Return a converted model with random weights.

    Args:
        conversion: One of ``CONVERSIONS``.
        engine: One of ``compiled``, ``packed``, ``eager`` and ``onnxruntime``.
        dtype: Dtype of the weights.
        shape: Configuration of the model.
        folder: Folder for the compiled or exported step.

    Raises:
        UserError: If the compiler or onnxruntime is missing.
    """
    torch.manual_seed(0)
    model = convert_model(CausalLM(shape).eval(), **CONVERSIONS[conversion])  # type: ignore[arg-type]
    subfolder, fingerprint = folder / conversion, model_fingerprint(model)
    if engine == "compiled":
        compile_missing(model, subfolder, dtype, fingerprint, lambda line: None)
    weights = linear_weights(model) + model.embedding.weight.numel()
    tokenizer = train_bpe([" "], 257, "<eos>", 1, False)
    whole = ConvertedModel(model, tokenizer, fingerprint)
    decoder = _decoder(whole, subfolder, dtype, engine)

    def size(context: int) -> int:
        return state_bytes(decoder.init_state(1))

    read = partial(_read, decoder)
    step_at = partial(_step_at, decoder, shape.vocab_size)
    return Subject(f"tnnlm-{conversion}-{engine}", dtype, weights * WIDTHS[dtype], step_at, read, size)


def peer(kind: str, dtype: str, shape: ModelConfig, longest: int) -> Subject:
    """Return a model of ``transformers`` with random weights, about as many per token as a tnnlm model.

    Args:
        kind: One of ``PEERS``.
        dtype: Dtype of the weights, float32 or bfloat16.
        shape: Configuration of the tnnlm model.
        longest: Longest context in tokens.

    Raises:
        UserError: If ``transformers`` is not installed.
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
    """Return a configuration with which a baseline has as many weights per token as a tnnlm model.

    Args:
        kind: One of ``PEERS``.
        shape: Configuration of the tnnlm model.
        longest: Longest context in tokens.
    """
    width = shape.d_model
    own = replace(shape, max_length=longest + 8)
    rest = _block_weights(shape) - 4 * width * width  # without the projections of attention
    if kind == "gpt2":
        return replace(own, glu_dim=max(1, round(rest / (2 * width))))
    if kind == "mamba":
        inner, rank = 2 * width, max(1, width // 16)
        block = 3 * width * inner + inner * (2 * rank + 2 * Mamba.STATE)
        return replace(own, n_layers=max(1, round(shape.n_layers * _block_weights(shape) / block)))
    # llama.cpp quantizes blocks of 32 weights.
    return replace(own, glu_dim=max(32, 32 * round(rest / (96 * width))))


def _block_weights(shape: ModelConfig) -> int:
    """Return the weights of a tnnlm layer: three matrices in the mixer and three in the GLU."""
    inner, hidden = shape.expand * shape.d_model, shape.glu_dim or shape.d_model
    return 3 * shape.d_model * (inner + hidden)


def _read(model: Any, prompt: Tensor) -> Any:
    """Prefill a prompt (B, L) in chunks and return the state."""
    state = model.init_state(len(prompt))
    *parts, last = prompt.split(CHUNK, dim=1)
    for chunk in parts:
        # Only a tnnlm model can omit the head.
        _, state = model.prefill(chunk, state, keep=int(isinstance(model, Peer)))
    return model.prefill(last, state, keep=1)[1]


def _step_at(model: Any, vocabulary: int, batch: int, context: int) -> Stepper:
    prompt = random_tokens(1, context, vocabulary).expand(batch, -1)
    # The speed of Mamba does not depend on the context, and its prefill without GPU kernels is a slow loop.
    state = _read(model, prompt[:, :8] if isinstance(model, Mamba) else prompt)
    tokens = torch.zeros(batch, dtype=torch.long)
    if isinstance(model, CausalLM | CompiledModel):
        return Stepper(InPlaceSteps(model, tokens, state), None)
    # A step of an exported program leaves the given state unchanged: nothing to undo.
    undo = partial(model.undo, state) if isinstance(model, Peer) else None
    return Stepper(partial(model.step, tokens, state), undo)


class InPlaceSteps:
    """Steps of a recurrence as generation runs them, each from the state after the last.

    Args:
        model: Converted model in any engine.
        tokens: Token ids (B,) of every step.
        state: State before the first step; it may be modified.
    """

    def __init__(self, model: DecoderModel, tokens: Tensor, state: ModelState) -> None:
        self._model, self._tokens, self._state = model, tokens, state

    def __call__(self) -> None:
        _, self._state = self._model.step_in_place(self._tokens, self._state)


def _decoder(converted: ConvertedModel, folder: Path, dtype: str, engine: str) -> Any:
    if engine == "onnxruntime":
        return OnnxModel(converted, folder)
    return open_engine(converted, folder, dtype=dtype, engine=engine).generator.model


def linear_weights(model: Any) -> int:
    """Return the number of weights in linear layers, including a tied head, without embeddings."""
    kinds = ("Linear", "Conv1D")
    return sum(m.weight.numel() for m in model.modules() if type(m).__name__ in kinds)
