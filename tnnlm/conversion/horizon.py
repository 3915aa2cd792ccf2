"""Horizon of a kernel: the number of lags after which the remaining kernel is float32 rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.conversion.linalg import row_scales
from tnnlm.kernels import Kernel

MAX_HORIZON = 16_384
"""Number of lags after which ``auto_horizon`` gives up if the kernel has not decayed."""

ROUNDING = torch.finfo(torch.float32).eps
"""Largest share of a channel's norm that may remain past the horizon: float32 rounding."""


def tail_energy(k: Tensor, horizon: int) -> float:
    """Return the largest share of a channel's energy at lags from ``horizon`` on, for taps k (E, L)."""
    energy = (k.double() / row_scales(k)).square()
    total = energy.sum(1)
    tail = energy[:, horizon:].sum(1)
    return float((tail / total.clamp(min=torch.finfo(torch.float64).tiny)).max())


def auto_horizon(kernel: Kernel, start: int) -> int | None:
    """Return the smallest horizon past which every channel has at most ``ROUNDING`` of its norm.

    Args:
        kernel: Kernel, which is evaluated without gradients at lengths that double.
        start: Largest horizon of the first attempt in lags, usually the training length.

    Returns:
        Horizon in lags, or None if the kernel has not decayed after ``MAX_HORIZON`` lags, or ``start`` lags
        if those are more.
    """
    length = max(2 * start, 2)
    longest = max(length, 2 * MAX_HORIZON)
    if kernel.support is not None:
        # A finite kernel may have zeros in the middle, so that taps before its end say nothing about it.
        horizon = _needed(kernel, kernel.support)[0]
        return horizon if horizon <= longest // 2 else None
    while True:
        horizon, finite = _needed(kernel, length)
        # If the kernel has not decayed in the first half, it may extend past the evaluated length.
        if horizon <= length // 2 and finite:
            return horizon
        if length >= longest:
            return None
        length = min(2 * length, longest)


@torch.no_grad()
def _needed(kernel: Kernel, length: int) -> tuple[int, bool]:
    """Return the smallest horizon among the first ``length`` lags, and whether their taps are finite."""
    k = kernel(length)
    energy = (k.double() / row_scales(k)).square()
    remaining = energy.flip(1).cumsum(1).flip(1)
    needed = (remaining > ROUNDING**2 * remaining[:, :1]).sum(1)
    return max(1, int(needed.max())), bool(torch.isfinite(remaining[:, 0]).all())
