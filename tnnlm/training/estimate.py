"""What a run will take, before it starts: parameters, tokens, memory, precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tnnlm.config.schema import Config
from tnnlm.machine.capabilities import capability
from tnnlm.models.backbone import Backbone
from tnnlm.models.causal_lm import LOGITS
from tnnlm.models.factory import build_model

FSDP = "fsdp"
"""the strategy that shards parameters, gradients and moments over devices"""

_BYTES = {"bf16-mixed": 2, "16-mixed": 2, "bf16-true": 2, "32-true": 4, "64-true": 8}


@dataclass(frozen=True)
class RunEstimate:
    """Sizes of a run that can be known without training."""

    params: int
    """trainable parameters"""
    buffers: int
    """numbers that are saved and not trained: decays"""
    tokens_per_update: int
    total_tokens: int
    memory_bytes: int
    """estimated peak per device: weights, gradients, Adam's moments, activations, logits"""
    precision: str
    devices: int


def estimate_run(config: Config) -> RunEstimate:
    """Build the model without memory and work out what training it takes."""
    with torch.device("meta"):
        model = build_model(config)
    precision = resolve_precision(config)
    devices = resolve_devices(config) * config.trainer.num_nodes
    per_update = tokens_per_update(config, devices)
    read = config.data.batch_size * config.model.max_length * (2 if config.model.pair else 1)
    return RunEstimate(
        params=model.n_params,
        buffers=sum(b.numel() for b in model.buffers()),
        tokens_per_update=per_update,
        total_tokens=per_update * config.trainer.max_steps,
        memory_bytes=_weights(config, model, devices) + _activations(config, read, _BYTES[precision]),
        precision=precision,
        devices=devices,
    )


def tokens_per_update(config: Config, devices: int) -> int:
    """Tokens that one optimizer step reads on all devices together."""
    return config.data.batch_size * config.model.max_length * config.trainer.accumulate * devices


def guessed_share(config: Config) -> float:
    """Share of the tokens for which there are logits over the vocabulary."""
    return {"causal": 1.0, "masked": config.data.mask_fraction}.get(config.task, 0.0)


def resolve_precision(config: Config) -> str:
    """``auto`` becomes bf16-mixed where the hardware computes in it, else 32-true."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    if resolve_accelerator(config) != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = capability("bfloat16_arithmetic").available
    return "bf16-mixed" if fast else "32-true"


def resolve_devices(config: Config) -> int:
    """``auto`` becomes every GPU, or the one CPU process."""
    if config.trainer.devices != "auto":
        return int(config.trainer.devices)
    on_gpu = resolve_accelerator(config) != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else 1


def resolve_accelerator(config: Config) -> str:
    """``auto`` becomes a CUDA or ROCm GPU where there is one, else the CPU.

    Lightning's own ``auto`` takes the GPU of an Apple machine, which has no float64: no kernel could be
    converted there.
    """
    if config.trainer.accelerator != "auto":
        return config.trainer.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def _weights(config: Config, model: Backbone, devices: int) -> int:
    """Weights, gradients, two moments and averages, if asked for, in float32.

    Sharded: a share of them; gathered, the embedding and two blocks, one at work and one on its way, with
    their gradients, or with all gradients where they wait for the last of several batches.
    """
    params = model.n_params
    if config.trainer.strategy != FSDP:
        return 4 * params * (4 if config.trainer.ema_decay is None else 5)
    embedding = model.embedding.weight.numel()
    gathered = embedding + 2 * (params - embedding) // config.model.n_layers
    waiting = gathered if config.trainer.accumulate == 1 else params
    return 16 * params // devices + 4 * (gathered + waiting)


def _activations(config: Config, rows: int, width: int) -> int:
    """What backward needs.

    Counted per token and layer as autograd keeps it: the mixer's two projections before and after
    SiLU, gate times output and the convolution's output (6 E at compute width), its spectrum of
    twice the length in complex64 (8 E bytes), the GLU (5 G) and residual stream with norms (6 D).
    """
    model = config.model
    inner = model.expand * model.d_model
    hidden = model.glu_dim or model.d_model
    layer = 6 * inner * width + 8 * inner + 5 * hidden * width + 6 * model.d_model * 4
    logits = round(guessed_share(config) * model.vocab_size) * (width + 8)
    if config.trainer.recompute:
        return rows * (model.n_layers * 4 * model.d_model + layer) + min(rows, LOGITS) * logits
    return rows * (model.n_layers * layer + logits)
