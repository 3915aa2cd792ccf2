"""Exact Toeplitz-to-SSM conversion, the published closed form (arXiv 2311.08756, algorithm 1).

n taps t and the balancing tap t_n = -sum t have a discrete Fourier transform of length n + 1
whose mode 0 vanishes; the other n modes are poles on the (n+1)-st roots of unity that reproduce
t exactly at lags below n. At lag n the recurrence gives t_n, and from n + 1 on it repeats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnnlm.conversion.blocks import channel_blocks
from tnnlm.ops.ssm import SSMParams


def etsc(k: Tensor, decay: Tensor | None = None) -> SSMParams:
    """Convert taps to a recurrence that reproduces them all.

    With a decay the un-decayed taps t[i] = k[i] / decay^i are converted and the poles multiplied
    by the decay, so that what comes after lag n fades: at lag n the tap is -decay^n sum(t), from
    n + 1 on decay^i t[i mod (n + 1)].

    Args:
        k: taps (E, n), n >= 1, finite.
        decay: per-channel decay (E,) in (0, 1], or None.

    Returns:
        parameters in the dtype of ``k``, worked out in float64, with ceil(n / 2) modes: pairs
        folded, poles shared by all channels if their decays are equal.

    Raises:
        ValueError: for empty or non-finite taps, or a decay outside (0, 1].
    """
    channels, n = k.shape
    if n < 1 or not bool(torch.isfinite(k).all()):
        raise ValueError("etsc needs at least one tap, and finite taps")
    rate = torch.ones(channels, dtype=torch.float64, device=k.device) if decay is None else decay.double()
    if not bool(((rate > 0) & (rate <= 1)).all()):
        raise ValueError("etsc needs decays in (0, 1]")
    # Angles come from a float64 arange: an integer one makes them complex64, good to 2e-4 only.
    modes = torch.arange(1, (n + 1) // 2 + 1, dtype=torch.float64, device=k.device)
    weight = torch.full_like(modes, 2.0 / (n + 1))
    angle = 2 * math.pi * modes / (n + 1)
    real, imag = torch.cos(angle), torch.sin(angle)
    if n % 2 == 1:
        # n + 1 is even: the last mode is the real pole -1, which has no partner.
        weight[-1], real[-1], imag[-1] = 1.0 / (n + 1), -1.0, 0.0
    residues = k.new_empty(channels, 2, len(modes))
    for part, block in channel_blocks(k):
        t = _undecayed(block, rate[part])
        spectrum = torch.fft.rfft(torch.cat((t, -t.sum(1, keepdim=True)), dim=1))[:, 1:] * weight
        residues[part] = torch.view_as_real(spectrum).transpose(1, 2)
    unit = torch.stack((real, imag))
    shared = bool((rate == rate[0]).all())
    poles = unit * rate[0] if shared else unit * rate[:, None, None]
    return SSMParams(k.new_zeros(channels, 0), poles, residues)


def _undecayed(k: Tensor, rate: Tensor) -> Tensor:
    lags = torch.arange(k.shape[1], dtype=torch.float64, device=k.device)
    envelope = rate[:, None] ** lags
    # Where the envelope itself has underflowed the tap is zero for every purpose.
    usable = envelope > torch.finfo(torch.float64).tiny
    return torch.where(usable, k / envelope.where(usable, torch.ones_like(envelope)), 0.0)
