"""AdamW with parameter groups for weight decay, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from tnnlm.config.schema import OptimConfig
from tnnlm.kernels import Kernel


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool = True) -> AdamW:
    """Return AdamW with groups for matrices, for biases and norms, and for kernels.

    ``config.decayed`` selects the groups with weight decay, and ``config.kernel_lr_scale`` scales the rate of
    the kernels. The groups don't depend on ``decayed``, so that a checkpoint loads under either value.
    """
    in_kernels = {
        id(p) for module in model.modules() if isinstance(module, Kernel) for p in module.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in in_kernels]
    decay = config.weight_decay
    others = decay if config.decayed == "all" else 0.0
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay, "lr": config.lr},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": others, "lr": config.lr},
        {
            "params": [p for p in trained if id(p) in in_kernels],
            "weight_decay": others,
            "lr": config.lr * config.kernel_lr_scale,
        },
    ]
    usable: list[dict[str, Any]] = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return AdamW(usable, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Return the learning rate at optimizer step ``step`` (from 0), as a fraction of the peak rate.

    The warm-up is linear over ``warmup_steps``, from ``warmup_start_lr`` at step 0 as in fairseq, or from
    1 / ``warmup_steps`` if that is 0. The schedule after it is a cosine down to ``min_lr_ratio`` at
    ``schedule_steps`` (None: ``max_steps``), sqrt(warmup_steps / step) as in fairseq's ``inverse_sqrt``, or
    constant.
    """
    warmup = config.warmup_steps
    if step < warmup:
        start = config.warmup_start_lr / config.lr
        return start + (1 - start) * step / warmup if start else (step + 1) / warmup
    if config.schedule == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / max(step, 1))
    if config.schedule == "constant":
        return 1.0
    end = max_steps if config.schedule_steps is None else config.schedule_steps
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """Return the schedule as a torch scheduler, to be stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, max_steps))
