"""Taps that conversions are tried on: a TNO's under any initialisation, and pathological ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.frame import Record
from tnnlm.kernels import TNOConfig
from tnnlm.kernels.tno import TNOKernel

CHANNELS = 16


def tno_taps(length: int, *, decay: float, init: str, depth: int) -> Tensor:
    """Taps (E, ``length``) of an untrained TNO kernel, in float64.

    Args:
        length: lags.
        decay: per lag; 1 for none.
        init: default, xavier or orthogonal, of the position encoder's weights.
        depth: its hidden layers.
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
    """Taps (E, ``length``) drawn from a distribution under an envelope that decays by 0.99, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(CHANNELS, length, generator=generator, dtype=torch.float64)

    k = normal()
    if distribution == "heavy tails":
        k = k / normal()  # Cauchy: no mean, no variance
    elif distribution == "dynamic range":
        k = k.sign() * 10 ** (8 * (2 * torch.rand(k.shape, generator=generator, dtype=torch.float64) - 1))
    elif distribution == "one late tap":
        k = torch.zeros_like(k)
        k[:, length * 3 // 4] = 1
        return k
    scale = {"tiny scale": 1e-30, "huge scale": 1e30}.get(distribution, 1.0)
    return scale * k * 0.99 ** torch.arange(length, dtype=torch.float64)


def resonances(length: int, distance: float) -> Tensor:
    """Taps (E, ``length``) of four decaying cosines each, whose poles are ``distance`` from the circle."""
    generator = torch.Generator().manual_seed(0)
    shape = (CHANNELS, 4, 1)
    phase, shift = (2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in "12")
    lags = torch.arange(length, dtype=torch.float64)
    return ((1 - distance) ** lags * torch.cos(phase * lags + shift)).sum(1)


def make_taps(cell: Record, length: int) -> Tensor:
    """The taps that a cell of the stability experiment names, on any number of lags."""
    source = cell["source"]
    if source == "tno":
        return tno_taps(length, decay=cell["decay"], init=cell["init"], depth=cell["depth"])
    if source == "resonances":
        return resonances(length, cell["distance"])
    n = cell["n"]
    k = random_taps(n, source)
    # Drawn taps end at n, whatever is asked for beyond.
    return torch.nn.functional.pad(k, (0, max(0, length - n)))[:, :length]
