"""How many lags a recurrence must get right: until what remains of the kernel is float32 rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.kernels import Kernel

MAX_HORIZON = 16_384
"""lags that ``auto_horizon`` looks at"""

ROUNDING = torch.finfo(torch.float32).eps
"""largest share of a channel's norm that may lie past the horizon"""


def tail_energy(k: Tensor, horizon: int) -> float:
    """Share of the energy of taps k (E, L) at lags from ``horizon`` on, of the worst channel."""
    energy = k.double().square()
    total = energy.sum(1)
    tail = energy[:, horizon:].sum(1)
    return float((tail / total.clamp(min=torch.finfo(torch.float64).tiny)).max())


def auto_horizon(kernel: Kernel, start: int) -> int | None:
    """Smallest horizon past which every channel's remaining energy is below float32 rounding, squared.

    Args:
        kernel: evaluated without gradient, on lengths that double from ``start``.
        start: first length to look at, usually the training length.

    Returns:
        the horizon, or None if the kernel has not died out by ``MAX_HORIZON`` lags.
    """
    length = max(2 * start, 2)
    while True:
        with torch.no_grad():
            energy = kernel(length).double().square()
        remaining = energy.flip(1).cumsum(1).flip(1)
        needed = (remaining > ROUNDING**2 * remaining[:, :1]).sum(1)
        horizon = max(1, int(needed.max()))
        # The second half must be empty, or the kernel may simply not have been seen to its end.
        if horizon <= length // 2 and bool(torch.isfinite(remaining[:, 0]).all()):
            return horizon
        if length >= 2 * MAX_HORIZON:
            return None
        length *= 2
