"""Estimates of a run's size before it starts: parameters, tokens, precision and devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.machine.capabilities import capability
from tnnlm.models.backbone import Backbone
from tnnlm.models.empty import without_weights
from tnnlm.training.trainable import build_trainable, n_frozen

FSDP = "fsdp"
"""Strategy that shards parameters, gradients and optimizer states across all devices."""
HSDP = "hsdp"
"""Strategy that shards them across groups of devices and replicates them between the groups."""
SHARDING = (FSDP, HSDP)
"""Strategies that shard the model."""


@dataclass(frozen=True)
class RunEstimate:
    """Sizes of a run, computed without training."""

    params: int
    """Number of trainable parameters."""
    frozen: int
    """Number of parameters that ``init.freeze`` or adapters exclude from training."""
    buffers: int
    """Number of elements in buffers, which are saved but not trained, such as decays."""
    tokens_per_update: int
    """Tokens per optimizer step on all devices."""
    total_tokens: int
    """Tokens in ``trainer.max_steps`` optimizer steps."""
    precision: str
    """Precision in Lightning's terms, with ``auto`` resolved."""
    devices: int
    """Number of devices on all nodes."""


def estimate_run(config: Config) -> RunEstimate:
    """Estimate a run from its configuration; the model is built on the meta device.

    Raises:
        ConfigError: If ``trainer.context_parallel`` doesn't divide the number of devices.
    """
    with without_weights():
        model = build_trainable(config)
    check_devices(config)
    precision = resolve_precision(config)
    devices = resolve_devices(config) * config.trainer.num_nodes
    per_update = tokens_per_update(config, devices)
    return RunEstimate(
        params=model.n_params,
        frozen=n_frozen(model),
        buffers=sum(b.numel() for b in model.buffers()),
        tokens_per_update=per_update,
        total_tokens=per_update * config.trainer.max_steps,
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
    """Resolve ``auto`` to bf16-mixed on hardware with bfloat16 arithmetic, otherwise to 32-true.

    A GPU that this machine lacks, for which ``--dry-run`` estimates a run, is assumed to have it.
    """
    if config.trainer.precision != "auto":
        return config.trainer.precision
    accelerator = resolve_accelerator(config)
    if accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("cuda", "gpu"):
        fast = True
    else:
        fast = capability("bfloat16_arithmetic").available
    return "bf16-mixed" if fast else "32-true"


def resolve_devices(config: Config) -> int:
    """Resolve ``auto`` to the number of GPUs, or to one process on the CPU."""
    if config.trainer.devices != "auto":
        return int(config.trainer.devices)
    on_gpu = resolve_accelerator(config) != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else 1


def resolve_shard_size(config: Config) -> int:
    """Return the number of devices that share one copy of a sharded model.

    Raises:
        ConfigError: If it doesn't divide the number of devices.
    """
    per_node = resolve_devices(config)
    devices = per_node * config.trainer.num_nodes
    if config.trainer.strategy != HSDP:
        return devices
    size = per_node if config.trainer.shard_size == "auto" else int(config.trainer.shard_size)
    if devices % size:
        raise ConfigError(
            f"trainer.shard_size={size}: must divide the number of devices, {devices}",
            "set trainer.devices and trainer.num_nodes, or trainer.shard_size=auto",
        )
    return size


def check_names(config: Config) -> None:
    """Check that Lightning has a ``trainer.accelerator`` and a ``trainer.strategy`` of the given names.

    Raises:
        ConfigError: If it doesn't; the message lists the names.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    for key, given, names in (
        ("accelerator", config.trainer.accelerator, ["gpu", *AcceleratorRegistry.available_accelerators()]),
        ("strategy", config.trainer.strategy, [HSDP, *StrategyRegistry.available_strategies()]),
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
    """Check that the devices of all nodes can be divided into groups that share sequences or weights.

    Raises:
        ConfigError: If ``trainer.context_parallel`` or ``trainer.shard_size`` doesn't divide the number of
            devices.
    """
    devices, size = resolve_devices(config) * config.trainer.num_nodes, config.trainer.context_parallel
    if devices % size:
        raise ConfigError(
            f"trainer.context_parallel={size}: must divide the number of devices, {devices}",
            "set trainer.devices and trainer.num_nodes, or trainer.context_parallel=1",
        )
    resolve_shard_size(config)


def resolve_accelerator(config: Config) -> str:
    """Resolve ``auto`` to a CUDA or ROCm GPU if one is available, otherwise to the CPU.

    Lightning's ``auto`` would select Apple's GPU, which lacks float64, and conversion needs float64.
    """
    if config.trainer.accelerator != "auto":
        return config.trainer.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def sharded_bytes(config: Config, model: Backbone) -> int:
    """Return the bytes per device of weights, gradients and Adam moments of a sharded model, all in float32.

    Every device holds its shard of them. In addition it holds unsharded all that is outside of the blocks
    (the embedding) and two blocks (the current one and the prefetched one) with their gradients. With
    gradient accumulation all gradients stay unsharded until the last micro-batch.
    """
    params, frozen = model.n_params, n_frozen(model)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    gathered = params + frozen - blocks + 2 * blocks // config.model.n_layers
    waiting = gathered if config.trainer.accumulate == 1 else params
    return (16 * params + 4 * frozen) // resolve_shard_size(config) + 4 * (gathered + waiting)
