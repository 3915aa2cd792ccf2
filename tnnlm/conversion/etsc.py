"""Exact Toeplitz-to-SSM conversion (ETSC), the published closed form (arXiv 2311.08756, algorithm 1).

The n taps t and the balancing tap t_n = -sum t have a discrete Fourier transform of length n + 1
whose mode 0 vanishes. The other n modes have poles on the (n+1)-st roots of unity and reproduce
t exactly at lags below n. The effective tap at lag n is t_n, and from lag n + 1 on the taps repeat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnnlm.conversion.linalg import channel_blocks
from tnnlm.ops.ssm import SSMParams


def etsc(k: Tensor, decay: Tensor | None = None) -> SSMParams:
    """Convert taps to a recurrence that reproduces all of them exactly.

    With a decay, the un-decayed taps t[i] = k[i] / decay^i are converted and the poles are multiplied
    by the decay, so that the repetition past lag n decays: the effective tap at lag n is
    -decay^n sum(t), and decay^i t[i mod (n + 1)] at lags i > n.

    Args:
        k: Taps (E, n), n >= 1, finite.
        decay: Decay per channel, (E,), in (0, 1], or None.

    Returns:
        Parameters in the dtype of ``k`` (poles in float64), computed in float64. They have ceil(n / 2)
        modes, one per conjugate pair; all channels share the poles if their decays are equal.

    Raises:
        ValueError: If the taps are empty or not finite, or a decay is outside (0, 1].
    """
    channels, n = k.shape
    if n < 1 or not bool(torch.isfinite(k).all()):
        raise ValueError("k: expected at least one tap, and finite taps")
    rate = torch.ones(channels, dtype=torch.float64, device=k.device) if decay is None else decay.double()
    if not bool(((rate > 0) & (rate <= 1)).all()):
        raise ValueError("decay: expected values above 0 and at most 1")
    unit = roots_of_unity(n + 1, k.device)[:, 1:]
    weight = torch.full_like(unit[0], 2.0 / (n + 1))
    if n % 2 == 1:
        # n + 1 is even, so the last mode is the real pole -1, which has no conjugate.
        weight[-1] = 1.0 / (n + 1)
    shared = bool((rate == rate[0]).all())
    poles = unit * rate[0] if shared else unit * rate[:, None, None]
    params = SSMParams(k.new_zeros(channels, 0), poles, k.new_zeros(channels, 2, len(weight)))
    for part, block in channel_blocks(k):
        params.residues[part] = _residues(block, rate[part], weight)
        if k.dtype == torch.float64:
            # Rounding errors of the poles grow with the lag. One step of iterative refinement fits the
            # residues to the rounded poles. In float32, rounding of the residues is larger than that.
            rest = params.channels_of(part).difference(block)
            params.residues[part] += _residues(rest, rate[part], weight)
    return params


def _residues(k: Tensor, rate: Tensor, weight: Tensor) -> Tensor:
    """Return residues (E, 2, N): Fourier coefficients of the balanced, un-decayed taps times ``weight``."""
    lags = torch.arange(k.shape[1], dtype=torch.float64, device=k.device)
    envelope = rate[:, None] ** lags
    # Taps at lags where the envelope underflows are negligible.
    usable = envelope > torch.finfo(torch.float64).tiny
    t = torch.where(usable, k / envelope.where(usable, torch.ones_like(envelope)), 0.0)
    spectrum = torch.fft.rfft(torch.cat((t, -t.sum(1, keepdim=True)), dim=1))[:, 1:] * weight
    return torch.view_as_real(spectrum).transpose(1, 2)


def roots_of_unity(n: int, device: torch.device | None = None) -> Tensor:
    """Return cos and sin of 2 pi m / n for m = 0 .. n // 2, (2, n // 2 + 1), to the last digit of float64.

    Integer arithmetic folds every angle into the first octant, so that no angle above pi / 4 is rounded.
    Rounding 2 pi m / n directly gives three times the error, and an integer ``arange`` times a complex
    number is complex64, which is accurate to 2e-4 only.
    """
    m = torch.arange(n // 2 + 1, device=device)
    # The angle is 8 m / n octants. In odd octants it is measured back from the end of the octant.
    octant = 8 * m // n
    folded = torch.where(octant % 2 == 0, 8 * m - octant * n, (octant + 1) * n - 8 * m)
    angle = folded.double() * (math.pi / 4) / n
    near, far = torch.cos(angle), torch.sin(angle)
    swapped = (octant == 1) | (octant == 2)
    cos, sin = torch.where(swapped, far, near), torch.where(swapped, near, far)
    return torch.stack((torch.where(octant >= 2, -cos, cos), sin))
