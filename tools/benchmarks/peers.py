"""Peers of ``transformers`` with as many weights per token as ours, and random ones: Llama, GPT-2, Mamba."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.subjects import CHUNK, WIDTHS, Stepper, Subject, discard, linear_weights, prompt_of
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError


def peer(kind: str, dtype: str, shape: ModelConfig, longest: int) -> Subject:
    """A model of ``transformers`` with about as many weights per token.

    Args:
        kind: ``llama``, ``gpt2`` or ``mamba``.
        dtype: float32 or bfloat16.
        shape: of our model, whose weights it is to have.
        longest: context that it must hold.

    Raises:
        UserError: if ``transformers`` is missing.
    """
    library = _transformers()
    torch.manual_seed(0)
    model: Any = _PEERS[kind](library, shape, longest).eval().to(getattr(torch, dtype)).requires_grad_(False)
    weights = linear_weights(model)
    stateful = kind == "mamba"

    def read(tokens: Tensor, cache: Any) -> Any:
        if stateful:
            return model(input_ids=tokens, use_cache=True, cache_params=cache)
        return model(input_ids=tokens, use_cache=True, past_key_values=cache, logits_to_keep=1)

    def step_at(batch: int, context: int) -> Stepper:
        tokens = torch.zeros(batch, 1, dtype=torch.long)
        prompt = prompt_of(context, shape.vocab_size).expand(batch, -1)
        if stateful:  # its time does not depend on the context, and it reads prompts in a loop
            cache = read(prompt[:, :8], None).cache_params
            return Stepper(lambda: discard(read(tokens, cache)))
        cache = library.DynamicCache()
        for chunk in prompt.split(CHUNK, dim=1):
            read(chunk, cache)
        # It grows in place.
        return Stepper(lambda: discard(read(tokens, cache)), lambda: cache.crop(-1))

    def prefill(prompt: Tensor) -> None:
        cache = None if stateful else library.DynamicCache()
        for chunk in prompt.split(CHUNK, dim=1):
            result = read(chunk, cache)
            cache = result.cache_params if stateful else cache

    def size(context: int) -> int:
        width = WIDTHS[dtype]
        if stateful:
            config = model.config
            return (
                width
                * config.num_hidden_layers
                * config.intermediate_size
                * (config.state_size + config.conv_kernel)
            )
        return 2 * width * shape.n_layers * shape.d_model * context

    return Subject(f"transformers-{kind}", dtype, weights * WIDTHS[dtype], step_at, prefill, size, longest)


def _llama(library: ModuleType, shape: ModelConfig, longest: int) -> Any:
    width = shape.d_model
    config = library.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=width,
        intermediate_size=llama_hidden(shape),
        num_hidden_layers=shape.n_layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=longest + 8,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return library.LlamaForCausalLM(config)


def gpt2(shape: ModelConfig, longest: int) -> Any:
    """GPT-2 with about as many parameters as our model has, and rows of up to ``longest`` tokens.

    Raises:
        UserError: if ``transformers`` is missing.
    """
    return _gpt2(_transformers(), shape, longest)


def _gpt2(library: ModuleType, shape: ModelConfig, longest: int) -> Any:
    width = shape.d_model
    config = library.GPT2Config(
        vocab_size=shape.vocab_size,
        n_embd=width,
        n_layer=shape.n_layers,
        n_head=max(1, width // 64),
        n_inner=max(1, round((_block_weights(shape) - 4 * width * width) / (2 * width))),
        n_positions=longest + 8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return library.GPT2LMHeadModel(config)


def _mamba(library: ModuleType, shape: ModelConfig, longest: int) -> Any:
    width = shape.d_model
    inner, rank, state = 2 * width, max(1, width // 16), 16
    block = 2 * width * inner + inner * (rank + 2 * state) + rank * inner + inner * width
    config = library.MambaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=width,
        state_size=state,
        num_hidden_layers=max(1, round(shape.n_layers * _block_weights(shape) / block)),
        tie_word_embeddings=True,
    )
    return library.MambaForCausalLM(config)


_PEERS = {"llama": _llama, "gpt2": _gpt2, "mamba": _mamba}
PEERS = tuple(_PEERS)


def llama_hidden(shape: ModelConfig) -> int:
    """Width of a Llama's feed-forward layer with which a layer has as many weights as ours; a multiple of 32
    for the block formats."""
    width = shape.d_model
    return max(32, 32 * round((_block_weights(shape) - 4 * width * width) / (96 * width)))


def _block_weights(shape: ModelConfig) -> int:
    """Of one of our layers: three products of the mixer, three of the GLU."""
    inner, hidden = shape.expand * shape.d_model, shape.glu_dim or shape.d_model
    return 3 * shape.d_model * (inner + hidden)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"peers need the package transformers: pip install -c constraints.txt -e '.[peers]' ({error})"
        ) from None
    return transformers
