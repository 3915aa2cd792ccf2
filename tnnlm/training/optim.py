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
    """Return AdamW with weight decay on matrices outside the kernels and ``kernel_lr_scale`` on kernels.

    Kernels have no weight decay, because shrinking the position network shortens the memory.
    """
    in_kernels = {
        id(p) for module in model.modules() if isinstance(module, Kernel) for p in module.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in in_kernels]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay, "lr": config.lr},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "lr": config.lr},
        {
            "params": [p for p in trained if id(p) in in_kernels],
            "weight_decay": 0.0,
            "lr": config.lr * config.kernel_lr_scale,
        },
    ]
    usable: list[dict[str, Any]] = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return AdamW(usable, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Return the learning rate at optimizer step ``step`` (from 0), as a fraction of the peak rate.

    After linear warm-up over ``warmup_steps`` the schedule is a cosine down to ``min_lr_ratio`` at
    ``max_steps``, sqrt(warmup_steps / step) as in fairseq's ``inverse_sqrt``, or constant.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / max(step, 1))
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """Return the schedule as a torch scheduler, to be stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, max_steps))
