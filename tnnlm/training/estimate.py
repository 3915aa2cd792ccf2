"""Estimates of a run's size before it starts: parameters, tokens, memory, precision and devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.machine.capabilities import capability
from tnnlm.models.backbone import Backbone
from tnnlm.models.factory import build_model
from tnnlm.ops.cross_entropy import MOST_ON_GPU

FSDP = "fsdp"
"""Strategy that shards parameters, gradients and optimizer states across devices."""

_BYTES = {"bf16-mixed": 2, "16-mixed": 2, "bf16-true": 2, "32-true": 4, "64-true": 8}


@dataclass(frozen=True)
class RunEstimate:
    """Sizes of a run, computed without training."""

    params: int
    """Number of trainable parameters."""
    buffers: int
    """Number of elements in buffers, which are saved but not trained, such as decays."""
    tokens_per_update: int
    """Tokens per optimizer step on all devices."""
    total_tokens: int
    """Tokens in ``trainer.max_steps`` optimizer steps."""
    memory_bytes: int
    """Estimated peak memory per device in bytes: weights, gradients, Adam moments, activations and logits."""
    precision: str
    """Precision in Lightning's terms, with ``auto`` resolved."""
    devices: int
    """Number of devices on all nodes."""


def estimate_run(config: Config) -> RunEstimate:
    """Estimate a run from its configuration; the model is built on the meta device.

    Raises:
        ConfigError: If ``trainer.context_parallel`` doesn't divide the number of devices.
    """
    with torch.device("meta"):
        model = build_model(config)
    check_devices(config)
    precision = resolve_precision(config)
    devices = resolve_devices(config) * config.trainer.num_nodes
    per_update = tokens_per_update(config, devices)
    read = config.data.batch_size * config.model.max_length * (2 if config.model.pair else 1)
    read //= config.trainer.context_parallel
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
    """Return the number of tokens in one optimizer step on all devices."""
    readers = devices // config.trainer.context_parallel
    return config.data.batch_size * config.model.max_length * config.trainer.accumulate * readers


def guessed_share(config: Config) -> float:
    """Return the share of tokens for which the model computes logits over the vocabulary."""
    return {"causal": 1.0, "masked": config.data.mask_fraction}.get(config.task, 0.0)


def resolve_precision(config: Config) -> str:
    """Resolve ``auto`` to bf16-mixed on hardware with bfloat16 arithmetic, otherwise to 32-true."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    if resolve_accelerator(config) != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = capability("bfloat16_arithmetic").available
    return "bf16-mixed" if fast else "32-true"


def resolve_devices(config: Config) -> int:
    """Resolve ``auto`` to the number of GPUs, or to one process on the CPU."""
    if config.trainer.devices != "auto":
        return int(config.trainer.devices)
    on_gpu = resolve_accelerator(config) != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else 1


def check_names(config: Config) -> None:
    """Check that Lightning has a ``trainer.accelerator`` and a ``trainer.strategy`` of the given names.

    Raises:
        ConfigError: If it doesn't; the message lists the names.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    for key, given, names in (
        ("accelerator", config.trainer.accelerator, ["gpu", *AcceleratorRegistry.available_accelerators()]),
        ("strategy", config.trainer.strategy, StrategyRegistry.available_strategies()),
    ):
        valid = ["auto", *sorted(names)]
        if given not in valid:
            raise ConfigError(f"trainer.{key}={given}: expected one of {', '.join(valid)}")


def check_accelerator(config: Config) -> None:
    """Check that this machine has the GPUs that ``trainer.accelerator`` and ``trainer.devices`` request.

    Raises:
        ConfigError: If a name is unknown, or there is no GPU, or fewer than requested.
    """
    check_names(config)
    name, devices = config.trainer.accelerator, config.trainer.devices
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not found:
        raise ConfigError("trainer.accelerator=cuda: PyTorch finds no GPU", "set trainer.accelerator=auto")
    if name in ("cuda", "auto") and found and devices != "auto" and int(devices) > found:
        raise ConfigError(
            f"trainer.devices={devices}: PyTorch finds {found} GPUs", f"set it to {found} or less, or to auto"
        )


def check_devices(config: Config) -> None:
    """Check that the devices of all nodes can be divided into groups that share sequences.

    Raises:
        ConfigError: If ``trainer.context_parallel`` doesn't divide the number of devices.
    """
    devices, size = resolve_devices(config) * config.trainer.num_nodes, config.trainer.context_parallel
    if devices % size:
        raise ConfigError(
            f"trainer.context_parallel={size}: must divide the number of devices, {devices}",
            "set trainer.devices and trainer.num_nodes, or trainer.context_parallel=1",
        )


def resolve_accelerator(config: Config) -> str:
    """Resolve ``auto`` to a CUDA or ROCm GPU if one is available, otherwise to the CPU.

    Lightning's ``auto`` would select Apple's GPU, which lacks float64, and conversion needs float64.
    """
    if config.trainer.accelerator != "auto":
        return config.trainer.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def _weights(config: Config, model: Backbone, devices: int) -> int:
    """Return the bytes per device of weights, gradients, Adam moments and averaged weights, all in float32.

    With FSDP every device holds its shard of them. In addition it holds unsharded all that is outside of the
    blocks (the embedding) and two blocks (the current one and the prefetched one) with their gradients. With
    gradient accumulation all gradients stay unsharded until the last micro-batch.
    """
    params = model.n_params
    if config.trainer.strategy != FSDP:
        return 4 * params * (4 if config.trainer.ema_decay is None else 5)
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad)
    gathered = params - blocks + 2 * blocks // config.model.n_layers
    waiting = gathered if config.trainer.accumulate == 1 else params
    return 16 * params // devices + 4 * (gathered + waiting)


def _activations(config: Config, rows: int, width: int) -> int:
    """Return the bytes of the activations that the backward pass needs, for ``rows`` tokens.

    Counted per token and layer, as autograd saves them: the mixer's two projections before and after SiLU,
    the gated output and the convolution's output (6 E in the compute dtype of ``width`` bytes), the
    convolution's spectrum of twice the length in complex64 (8 E bytes), the GLU (5 G in the compute dtype)
    and the residual stream with norms (6 D in float32). In addition the logits that are kept at once.
    """
    model = config.model
    inner = model.expand * model.d_model
    hidden = model.glu_dim or model.d_model
    layer = 6 * inner * width + 8 * inner + 5 * hidden * width + 6 * model.d_model * 4
    scored = round(guessed_share(config) * rows)
    head = min(scored * model.vocab_size, MOST_ON_GPU) * (width + 8)
    if config.trainer.recompute:
        return rows * (model.n_layers * 4 * model.d_model + layer) + head
    return rows * model.n_layers * layer + head
