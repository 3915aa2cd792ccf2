"""Optimizers with parameter groups for weight decay, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tnnlm.config.optim import OptimConfig
from tnnlm.errors import ConfigError
from tnnlm.kernels import Kernel

MOMENTUM = 0.95
"""Momentum of Muon."""


class MuonAdamW(Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with one state."""

    def __init__(self, muon: Optimizer, adamw: AdamW) -> None:
        """Join two optimizers.

        Args:
            muon: ``torch.optim.Muon``.
            adamw: AdamW over other parameters.
        """
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._muon, self._adamw = muon, adamw

    def step(self, closure: Any = None) -> Any:
        """Update all parameters with a gradient; ``closure`` computes the gradients, and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint replaces the groups and the state.
        self._muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        self._adamw.param_groups = [group for group in self.param_groups if "betas" in group]
        for part in (self._muon, self._adamw):
            part.state = self.state
            part.step()
        return loss


def check_optimizer(config: OptimConfig) -> None:
    """Check that this version of PyTorch has the optimizer.

    Raises:
        ConfigError: If it has not.
    """
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optim.optimizer=muon: needs PyTorch 2.9 or newer, and this is {torch.__version__}",
            "update torch, or set optim.optimizer=adamw",
        )


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool = True) -> Optimizer:
    """Return AdamW with groups for matrices, for biases and norms, and for kernels, or Muon with AdamW.

    Muon has the matrices of ``model.blocks`` outside of kernels, in the first group. ``config.decayed``
    selects the groups of AdamW with weight decay, and ``config.kernel_lr_scale`` scales the rate of the
    kernels. The groups don't depend on ``decayed``, so that a checkpoint loads under either value.

    Raises:
        ConfigError: If this version of PyTorch does not have the optimizer.
    """
    in_kernels = {
        id(p) for module in model.modules() if isinstance(module, Kernel) for p in module.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in in_kernels]
    hidden: list[nn.Parameter] = []
    if config.optimizer == "muon":
        check_optimizer(config)
        inside = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.")}
        hidden = [p for p in rest if p.dim() == 2 and id(p) in inside]
        rest = [p for p in rest if p.dim() != 2 or id(p) not in inside]
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
    adamw = AdamW(usable, lr=config.lr, betas=betas, eps=config.eps, fused=fused) if usable else None
    if adamw is not None and not hidden:
        return adamw
    muon = torch.optim.Muon(
        hidden, lr=config.lr, weight_decay=decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    # Adapters are matrices of the blocks, and leave nothing to AdamW.
    return muon if adamw is None else MuonAdamW(muon, adamw)


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Return the learning rate at optimizer step ``step`` (from 0), as a fraction of the peak rate.

    The warm-up is linear over ``warmup_steps``, from ``warmup_start_lr`` at step 0 as in fairseq, or from
    1 / ``warmup_steps`` if that is 0. The schedule after it is a cosine down to ``min_lr_ratio`` at
    ``schedule_steps`` (None: ``max_steps``), sqrt(warmup_steps / step) as in fairseq's ``inverse_sqrt``,
    constant, or constant with a linear decay to ``min_lr_ratio`` over the last ``decay_share`` of the steps
    (arXiv 2404.06395).
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
    if config.schedule == "wsd":
        stable = max(warmup, end - round(config.decay_share * end))
        progress = min(1.0, max(0, step - stable) / max(1, end - stable))
        return 1 - (1 - config.min_lr_ratio) * progress
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """Return the schedule as a torch scheduler, to be stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, max_steps))
