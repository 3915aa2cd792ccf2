"""Test taps for conversions: TNO kernels with any initialisation, and pathological kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.frame import Record
from tnnlm.kernels import TNOConfig
from tnnlm.kernels.tno import TNOKernel

CHANNELS = 16


def tno_taps(length: int, *, decay: float, init: str, depth: int) -> Tensor:
    """Return taps (E, ``length``) of an untrained TNO kernel, in float64.

    Args:
        length: Number of lags.
        decay: Decay per lag; 1 disables it.
        init: Initialisation of the position encoder's weights: default, xavier or orthogonal.
        depth: Hidden layers of the position encoder.
    """
    torch.manual_seed(0)
    kernel = TNOKernel(TNOConfig(rpe_dim=32, rpe_layers=depth, decay=decay), CHANNELS).double()
    if init != "default":
        initialise = {"xavier": nn.init.xavier_uniform_, "orthogonal": nn.init.orthogonal_}[init]
        for weight in kernel.rpe.parameters():
            if weight.dim() == 2:
                initialise(weight)
    with torch.no_grad():
        return kernel(length)


def random_taps(length: int, distribution: str) -> Tensor:
    """Sample taps (E, ``length``) from a distribution, times an envelope of decay 0.99, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(CHANNELS, length, generator=generator, dtype=torch.float64)

    k = normal()
    if distribution == "heavy tails":
        k = k / normal()  # Cauchy distribution: no mean, no variance
    elif distribution == "dynamic range":
        k = k.sign() * 10 ** (8 * (2 * torch.rand(k.shape, generator=generator, dtype=torch.float64) - 1))
    elif distribution == "one late tap":
        k = torch.zeros_like(k)
        k[:, length * 3 // 4] = 1
        return k
    scale = {"tiny scale": 1e-30, "huge scale": 1e30}.get(distribution, 1.0)
    return scale * k * 0.99 ** torch.arange(length, dtype=torch.float64)


def resonances(length: int, distance: float) -> Tensor:
    """Return taps (E, ``length``), sums of four decaying cosines with poles at modulus 1 - ``distance``."""
    generator = torch.Generator().manual_seed(0)
    shape = (CHANNELS, 4, 1)
    phase, shift = (2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in "12")
    lags = torch.arange(length, dtype=torch.float64)
    return ((1 - distance) ** lags * torch.cos(phase * lags + shift)).sum(1)


def make_taps(cell: Record, length: int) -> Tensor:
    """Return the taps of a cell of the stability experiment, for any number of lags."""
    source = cell["source"]
    if source == "tno":
        return tno_taps(length, decay=cell["decay"], init=cell["init"], depth=cell["depth"])
    if source == "resonances":
        return resonances(length, cell["distance"])
    n = cell["n"]
    k = random_taps(n, source)
    # Random taps have n lags; the rest is zero.
    return torch.nn.functional.pad(k, (0, max(0, length - n)))[:, :length]
