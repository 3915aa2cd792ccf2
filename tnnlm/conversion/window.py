"""Exact window: the state is a window of the last inputs. It is the cost baseline of every other method."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.ops.ssm import SSMParams


def window(k: Tensor) -> SSMParams:
    """Return a recurrence with a copy of taps (E, n): exact below lag n, zero from lag n on.

    The copy stays unchanged when the kernel is trained further, and has no gradient.

    Raises:
        ValueError: If the taps are empty or not finite.
    """
    if k.shape[1] < 1 or not bool(torch.isfinite(k).all()):
        raise ValueError("k: expected at least one tap, and finite taps")
    k = k.detach().clone()
    return SSMParams(k, torch.zeros(2, 0, dtype=torch.float64, device=k.device), k.new_zeros(len(k), 2, 0))
