"""Upper bounds of the l1 norm of kernels and recurrences past the lags at which they were evaluated.

All bounds are geometric: |k[i]| <= M r^i for i >= R gives sum |k[i]| <= M r^R / (1 - r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.kernels import Kernel
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams

_UNDAMPED = 1 - 1e-12
"""Modulus from which a pole counts as being on the unit circle, because rounding may have moved it inside."""
_RADII = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Positions of the circles, between the largest pole and the unit circle, of the weights."""


def kernel_tail(kernel: Kernel, k: Tensor, own: Params | None) -> Tensor | None:
    """Return upper bounds (E,) of the l1 norm of a kernel past its taps k (E, R); None if nothing bounds it.

    They are infinite if the recurrence of the kernel has a pole on or outside the unit circle. Only a kernel
    that states neither its support, nor a decay below 1, nor a recurrence, and whose second half of taps is
    zero, is taken to have ended.
    """
    support, decay = kernel.support, kernel.decay
    if support is not None and support <= k.shape[1]:
        return k.new_zeros(len(k), dtype=torch.float64)
    if decay is not None and (bound := decay_tail(k, decay)) is not None:
        return bound
    if own is not None:
        return recurrence_tail(own, k.shape[1])
    ended = not bool(k[:, k.shape[1] // 2 :].any())
    return k.new_zeros(len(k), dtype=torch.float64) if ended and support is None else None


def decay_tail(k: Tensor, decay: Tensor) -> Tensor | None:
    """Return upper bounds (E,) past taps k (E, R) = decay^i t[i], given that t doesn't grow.

    None if a decay is 1.
    """
    rate = decay.double()
    if bool((rate >= 1).any()):
        return None
    lags = torch.arange(k.shape[1], dtype=torch.float64, device=k.device)
    envelope = rate[:, None] ** lags
    usable = envelope > torch.finfo(torch.float64).tiny
    largest = torch.where(usable, k.double().abs() / envelope.where(usable, torch.ones_like(envelope)), 0.0)
    return largest.amax(1) * rate ** k.shape[1] / (1 - rate)


def recurrence_tail(params: Params, start: int) -> Tensor:
    """Return upper bounds (E,) of the l1 norm of a recurrence at lags from ``start`` on.

    They are infinite for a pole on or outside the unit circle.
    """
    if isinstance(params, SSMParams):
        return _ssm_tail(params, start)
    if isinstance(params, CompanionParams):
        return _companion_tail(params, start)
    # Without poles, the taps past as many lags as the state has numbers are zero.
    bound = params.taps(max(start, params.order() + 1))[:, start:].abs().sum(1)
    return bound if params.largest_pole() == 0 else torch.full_like(bound, torch.inf)


def _ssm_tail(params: SSMParams, start: int) -> Tensor:
    """Bound modes by their moduli: |Re c lam^i| <= |c| |lam|^i."""
    weight = torch.hypot(*params.residues.double().unbind(1))  # squares of large residues would overflow
    radius = torch.hypot(*params.poles.double().unbind(-2)).expand(weight.shape)
    undamped = radius >= _UNDAMPED
    inside = radius.where(~undamped, torch.zeros_like(radius))
    bound = torch.where(undamped, torch.inf, inside**start / (1 - inside))
    modes = torch.where(weight == 0, 0.0, weight * bound).sum(1)
    return modes + params.window[:, start:].double().abs().sum(1)


def _companion_tail(params: CompanionParams, start: int) -> Tensor:
    """Bound taps by a weighted energy.

    By the inequality of Cauchy and Schwarz, for every r below 1,

    sum_{i >= R} |h[i]| <= r^R sqrt(sum_i (h[i] / r^i)^2 / (1 - r^2)).

    The energy has a closed form, which no narrow peak of H escapes as it may escape samples of H. The
    smallest bound over the radii r between the largest pole and 1 is kept.
    """
    radius, n = params.largest_pole(), params.order()
    best = torch.full_like(params.direct, torch.inf, dtype=torch.float64)
    if radius < _UNDAMPED:
        exponents = torch.arange(1, n + 1, dtype=torch.float64, device=best.device)
        denominator = params.channels_of(slice(None)).denominator.double()
        for position in _RADII:
            r = max(radius + position * (1 - radius), 0.5)
            energy = _energy(*(part.double() * r**-exponents for part in (params.numerator, denominator)))
            best = torch.fmin(best, energy.sqrt() * r**start / (1 - r * r) ** 0.5)
    return best.where(params.numerator.any(1), 0.0)


def _energy(c: Tensor, a: Tensor) -> Tensor:
    """Return the sums (E,) of squared taps of c(z) / (1 + a(z)), c and a (E, n); infinite if unstable.

    The recursion over the degree is that of Astrom, Jury and Agniel (1970), whose terms are never negative.
    """
    one = torch.ones_like(a[:, :1])
    a, b = torch.cat((one, a), dim=1), torch.cat((torch.zeros_like(one), c), dim=1)
    total, stable = torch.zeros_like(a[:, 0]), torch.ones_like(a[:, 0], dtype=torch.bool)
    while a.shape[1] > 1:
        first, reversed_ = a[:, :1], a.flip(1)
        total = total + b[:, -1].square() / a[:, 0]
        b = (b - b[:, -1:] / first * reversed_)[:, :-1]
        a = (a - a[:, -1:] / first * reversed_)[:, :-1]
        stable = stable & (a[:, 0] > 0)
    total = total + b[:, 0].square() / a[:, 0]
    return torch.where(stable & torch.isfinite(total), total, torch.inf)
