"""The exact window: the last n inputs themselves are the state. The fair baseline for every cost."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.ops.ssm import SSMParams


def window(k: Tensor) -> SSMParams:
    """Keep taps (E, n) as they are: exact below lag n, zero from n on.

    Raises:
        ValueError: for empty or non-finite taps.
    """
    if k.shape[1] < 1 or not bool(torch.isfinite(k).all()):
        raise ValueError("window needs at least one tap, and finite taps")
    return SSMParams(k, torch.zeros(2, 0, dtype=torch.float64, device=k.device), k.new_zeros(len(k), 2, 0))
