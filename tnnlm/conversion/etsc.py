"""Exact Toeplitz-to-SSM conversion, the published closed form (arXiv 2311.08756, algorithm 1).

n taps t and the balancing tap t_n = -sum t have a discrete Fourier transform of length n + 1
whose mode 0 vanishes; the other n modes are poles on the (n+1)-st roots of unity that reproduce
t exactly at lags below n. At lag n the recurrence gives t_n, and from n + 1 on it repeats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnnlm.conversion.linalg import channel_blocks
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
    unit = roots_of_unity(n + 1, k.device)[:, 1:]
    weight = torch.full_like(unit[0], 2.0 / (n + 1))
    if n % 2 == 1:
        # n + 1 is even: the last mode is the real pole -1, which has no partner.
        weight[-1] = 1.0 / (n + 1)
    shared = bool((rate == rate[0]).all())
    poles = unit * rate[0] if shared else unit * rate[:, None, None]
    params = SSMParams(k.new_zeros(channels, 0), poles, k.new_zeros(channels, 2, len(weight)))
    for part, block in channel_blocks(k):
        params.residues[part] = _residues(block, rate[part], weight)
        if k.dtype == torch.float64:
            # Poles are off by rounding, and lag n multiplies that: one step of iterative refinement
            # fits the residues to the poles as they are. In float32 their own rounding is larger.
            rest = block - params.channels_of(part).taps(n)
            params.residues[part] += _residues(rest, rate[part], weight)
    return params


def _residues(k: Tensor, rate: Tensor, weight: Tensor) -> Tensor:
    """Planes (E, 2, N): the balanced, un-decayed taps' discrete Fourier transform, a pair counted once."""
    lags = torch.arange(k.shape[1], dtype=torch.float64, device=k.device)
    envelope = rate[:, None] ** lags
    # Where the envelope itself has underflowed the tap is zero for every purpose.
    usable = envelope > torch.finfo(torch.float64).tiny
    t = torch.where(usable, k / envelope.where(usable, torch.ones_like(envelope)), 0.0)
    spectrum = torch.fft.rfft(torch.cat((t, -t.sum(1, keepdim=True)), dim=1))[:, 1:] * weight
    return torch.view_as_real(spectrum).transpose(1, 2)


def roots_of_unity(n: int, device: torch.device | None = None) -> Tensor:
    """cos and sin of 2 pi m / n for m = 0 .. n // 2 as planes (2, n // 2 + 1), to the last digit of float64.

    The angle itself is rounded at most at pi / 4: integers fold it into the first octant. Rounding
    2 pi m / n directly costs three times as much, and an integer ``arange`` times a complex number is
    complex64, good to 2e-4 only.
    """
    m = torch.arange(n // 2 + 1, device=device)
    # In eighths of a turn, m = 8 m / n of them: odd octants are counted back from their end.
    octant = 8 * m // n
    folded = torch.where(octant % 2 == 0, 8 * m - octant * n, (octant + 1) * n - 8 * m)
    angle = folded.double() * (math.pi / 4) / n
    near, far = torch.cos(angle), torch.sin(angle)
    swapped = (octant == 1) | (octant == 2)
    cos, sin = torch.where(swapped, far, near), torch.where(swapped, near, far)
    return torch.stack((torch.where(octant >= 2, -cos, cos), sin))
