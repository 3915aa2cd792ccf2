"""Recurrence fitted by gradient descent, the baseline that the ETSC paper compares with (arXiv 2311.08756).

Adam minimises the relative squared error of the taps over poles and residues. The parametrisation keeps
poles inside the unit circle: radius exp(-exp(a)) and a free angle. This baseline is slower and less
accurate than the methods in closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.realization import LARGEST_POLE
from tnnlm.ops.ssm import SSMParams


@torch.enable_grad()
def gradient(
    k: Tensor, *, order: int, steps: int = 2000, lr: float = 1e-2, progress: Progress = silent
) -> SSMParams:
    """Fit shared poles and per-channel residues to taps with Adam.

    Args:
        k: Taps (E, T), finite.
        order: Real state numbers per channel; odd numbers are rounded up to whole conjugate pairs.
        steps: Number of Adam steps.
        lr: Initial learning rate, annealed to zero by a cosine schedule.
        progress: Progress bar for the steps.

    Returns:
        Parameters in float64, of the step with the smallest error.
    """
    k, modes = k.detach().double(), (order + 1) // 2
    channels, length = k.shape
    size = k.norm()
    norm = size.where(size > 0, torch.ones_like(size))
    generator = torch.Generator(k.device).manual_seed(0)
    # Memory lengths, in lags, are spaced logarithmically from 1 to a quarter of the taps; angles are spaced
    # evenly over the upper half of the circle, from the constant to the alternating mode.
    memory = torch.logspace(0, math.log10(max(length / 4, 2)), modes, dtype=torch.float64, device=k.device)
    damping = (1 / memory).log().requires_grad_()
    angle = torch.linspace(0, math.pi, modes, dtype=torch.float64, device=k.device).requires_grad_()
    residues = torch.randn(channels, 2, modes, dtype=torch.float64, device=k.device, generator=generator)
    residues = (residues * size / k.numel() ** 0.5 / modes).requires_grad_()
    optimizer = torch.optim.Adam((damping, angle, residues), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    lags = torch.arange(length, dtype=torch.float64, device=k.device)
    best = math.inf
    kept: list[Tensor] = [damping, angle, residues]
    for _ in progress(range(steps), "gradient steps"):
        optimizer.zero_grad()
        radius = torch.exp(-damping.exp()[:, None] * lags)
        basis = torch.stack(
            (radius * torch.cos(angle[:, None] * lags), -radius * torch.sin(angle[:, None] * lags))
        )
        error = residues.flatten(1) @ basis.flatten(0, 1) - k
        loss = (error.norm() / norm).square()
        if float(loss.detach()) < best:
            best = float(loss.detach())
            kept = [part.detach().clone() for part in (damping, angle, residues)]
        loss.backward()
        optimizer.step()
        schedule.step()
    damping, angle, residues = kept
    radius = torch.exp(-damping.detach().exp()).clamp(max=LARGEST_POLE)
    poles = torch.stack((radius * angle.detach().cos(), radius * angle.detach().sin()))
    return SSMParams(k.new_zeros(channels, 0), poles, residues.detach())
