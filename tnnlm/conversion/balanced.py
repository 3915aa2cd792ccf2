"""Balanced reduction of taps to a recurrence with few poles, by the Ho-Kalman method (also known as ERA).

All channels of a TNO layer share the last hidden features of its RPE network, so the taps have low
rank and one small set of poles fits every channel:

1. Compress the taps k (E, T) to their leading linear combinations of channels f (R, T).
2. Take the leading right singular vectors V of the block Hankel matrix of f as the states. Their shift
   by one lag is the state matrix, A = V[1:]^T V[:-1] (Ho and Kalman 1966; Kung 1978). For taps that
   decay to zero A is a contraction, so no pole is outside the unit circle.
3. Fit output weights to the taps of every channel by least squares, then diagonalise A to get poles
   and residues. If window taps reproduce the first lags, steps 1 to 3 use the lags after them.
4. Take the smallest order whose measured error meets the tolerance.

The Hankel-norm error has a lower bound at every order, see :mod:`tnnlm.conversion.certify`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.conversion.linalg import channel_blocks, compress, row_scales
from tnnlm.conversion.realization import Realization, realize
from tnnlm.conversion.source import CLOSER, SAMPLE, ToleranceError, relative_error
from tnnlm.ops.powers import pole_powers
from tnnlm.ops.ssm import SSMParams

RANK = 128
"""Largest number of linear combinations of channels from which shared poles are computed."""
MAX_ORDER = 128
"""Largest order that is tried to meet a tolerance."""
_STATE_BYTES = 1 << 28
"""Memory for the states of the channels that are solved at once with per-channel poles, in bytes."""
_SMALLEST_GAINS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Smallest singular values of the modes after the window, relative to the largest, in the order of trial.
Modes with smaller ones are dropped, because they get large residues, which cancel each other in float32."""


def balanced(
    k: Tensor,
    *,
    order: int | None = None,
    tolerance: float = 1e-3,
    poles: str = "shared",
    window_taps: int = 0,
    finite: bool = False,
    max_order: int | None = None,
) -> SSMParams:
    """Reduce taps to a recurrence of small order.

    Args:
        k: Taps (E, T), finite, with T large enough to cover the kernel.
        order: Real state numbers per channel, window taps included, at most T. None takes the
            smallest order that meets ``tolerance``.
        tolerance: Largest relative error ||k - k^|| / ||k|| (Frobenius norm). With per-channel poles
            it applies to every channel.
        poles: ``shared`` for one set of poles for all channels, or ``channel`` for one set per
            channel, for kernels whose channels have no structure in common.
        window_taps: Number P < T of first lags that a window of the last inputs reproduces exactly.
        finite: Whether the taps are zero from lag T on, even if the last ones are not small.
        max_order: Largest order to try, window taps included; None takes ``MAX_ORDER`` after the window.

    Returns:
        Parameters in float64.

    Raises:
        ToleranceError: If no order up to the largest one meets the tolerance.
    """
    tail = k[:, window_taps:]
    modes = None if order is None else order - window_taps
    most = MAX_ORDER if max_order is None else max(1, min(max_order - window_taps, MAX_ORDER))
    if poles == "shared":
        # All channels together are one problem, so the norms are over all channels.
        norms = [torch.stack([block.norm() for _, block in channel_blocks(x)]).norm() for x in (tail, k)]
        problem = Problem(compress(tail, RANK).unsqueeze(0), norms[0][None], norms[1][None], finite)
        params = _shared(*_fit(problem, modes, tolerance, most), tail)
    else:
        if order is None and len(k) > SAMPLE:
            # If the tolerance can't be met, a few channels show it at once; all of them take minutes.
            chosen = torch.linspace(0, len(k) - 1, SAMPLE, device=k.device).round().long()
            _fit_channels(k[chosen], window_taps, finite, modes, tolerance, most)
        params = _per_channel(*_fit_channels(k, window_taps, finite, modes, tolerance, most))
    if not window_taps:
        return params
    for gain in _SMALLEST_GAINS:
        params = _after_window(k, params.poles, window_taps, gain)
        if order is not None or relative_error(k, params) <= tolerance:
            break
    return params


class Problem(NamedTuple):
    """Taps to fit, for G problems at once."""

    f: Tensor
    """Taps after the window, or linear combinations of their channels, (G, R, T)."""
    norm: Tensor
    """Norms of the taps after the window, before channels were combined, (G,)."""
    whole: Tensor
    """Norms of all taps, which errors are relative to, (G,)."""
    finite: bool
    """Whether the taps are zero from lag T on."""


def _fit(
    problem: Problem, order: int | None, tolerance: float, most: int, least: int = 1
) -> tuple[Realization, int]:
    """Return a realization and the order to use: ``order``, or the smallest that meets ``tolerance``.

    Orders below ``least`` and above ``most`` are not tried to meet it.
    """
    if order is not None:
        realization = realize(problem.f, order, problem.finite)
        return realization, min(order, realization.start.shape[1])
    below = tried = least - 1
    reached, best = 1.0, 0
    for limit in sorted({max(least, min(32, most)), most}):
        realization = realize(problem.f, limit, problem.finite)
        largest = realization.start.shape[1]
        # From small orders upwards, because states beyond the rank of the taps are noise and fit worse.
        while tried < largest or best == 0:
            tried = min(max(tried + 1, tried * 3 // 2 if tried >= least else 0), largest)
            error = _error(problem, realization, tried)
            if best == 0 or error < reached:
                reached, best = error, tried
            if error <= tolerance:
                return realization, _bisect(problem, realization, tolerance, below, tried)
            below = tried
    raise ToleranceError(
        f"tolerance {tolerance:g}: can't be met, the smallest relative error up to order {tried} is "
        f"{reached:.1e}, at order {best}",
        CLOSER,
        reached,
    )


def _bisect(problem: Problem, realization: Realization, tolerance: float, low: int, high: int) -> int:
    """Return the smallest order above ``low`` that meets the tolerance, given that ``high`` meets it."""
    while high - low > 1:
        middle = (low + high) // 2
        if _error(problem, realization, middle) <= tolerance:
            high = middle
        else:
            low = middle
    return high


def _error(problem: Problem, realization: Realization, order: int) -> float:
    """Return the relative error of the least-squares fit at an order, the largest over the problems."""
    f = problem.f
    basis = torch.linalg.qr(realization.states(order, f.shape[2]))[0]
    missed = (f - (f @ basis) @ basis.transpose(1, 2)).square().sum((1, 2))
    dropped = (problem.norm.square() - f.square().sum((1, 2))).clamp(min=0)
    tiny = torch.finfo(torch.float64).tiny
    return float(((missed + dropped) / problem.whole.square().clamp(min=tiny)).max().sqrt())


def _fit_channels(
    k: Tensor, window_taps: int, finite: bool, order: int | None, tolerance: float, most: int
) -> tuple[list[tuple[Tensor, Realization]], int]:
    """Return taps after the window and realization of each block of channels, and one order for all.

    Every channel of k (E, T) is one problem of :func:`_fit`.
    """
    width = max(1, _STATE_BYTES // (8 * k.shape[1] * MAX_ORDER))
    fits, n = [], 1
    for block in k.split(width):
        scales = row_scales(block)
        whole = block.double() / scales
        f = whole[:, None, window_taps:]
        problem = Problem(f, f.flatten(1).norm(dim=1), whole.norm(dim=1), finite)
        # All channels get the largest order of a block, so that no block needs a smaller one.
        realization, n = _fit(problem, order, tolerance, most, n)
        fits.append((f * scales.unsqueeze(2), realization))
    return fits, n


def _shared(realization: Realization, order: int, k: Tensor) -> SSMParams:
    lam, modal = _modal(realization, order)
    states = realization.states(order, k.shape[1])[0]
    basis, upper = torch.linalg.qr(states)
    residues = k.new_empty(k.shape[0], 2, lam.shape[1], dtype=torch.float64)
    for part, block in channel_blocks(k):
        weights = _solve_upper(upper, (block @ basis).T).T
        residues[part] = torch.view_as_real(weights.to(modal.dtype) @ modal[0]).transpose(1, 2)
    poles = torch.view_as_real(lam[0]).T.contiguous()
    return SSMParams(residues.new_zeros(k.shape[0], 0), poles, residues)


def _per_channel(fits: list[tuple[Tensor, Realization]], order: int) -> SSMParams:
    poles, residues = [], []
    for f, realization in fits:
        lam, modal = _modal(realization, order)
        basis, upper = torch.linalg.qr(realization.states(order, f.shape[2]))
        weights = _solve_upper(upper, (f @ basis).transpose(1, 2))
        c = (weights.transpose(1, 2).to(modal.dtype) @ modal).squeeze(1)
        poles.append(torch.view_as_real(lam).transpose(1, 2))
        residues.append(torch.view_as_real(c).transpose(1, 2))
    modes = max(part.shape[2] for part in poles)
    # Channels with more real poles have more modes. The others are padded with modes of residue zero.
    padded = [
        torch.cat([torch.nn.functional.pad(part, (0, modes - part.shape[2])) for part in parts])
        for parts in (poles, residues)
    ]
    return SSMParams(padded[1].new_zeros(len(padded[1]), 0), *padded)


def _solve_upper(upper: Tensor, right: Tensor) -> Tensor:
    """Solve upper triangular systems; singular ones, of dependent states, by least squares."""
    diagonal = upper.diagonal(dim1=-2, dim2=-1).abs()
    eps = torch.finfo(upper.dtype).eps
    if bool((diagonal.amin(-1) > eps * diagonal.amax(-1)).all()):
        return torch.linalg.solve_triangular(upper, right, upper=True)
    return torch.linalg.pinv(upper) @ right


def _after_window(k: Tensor, poles: Tensor, width: int, smallest_gain: float) -> SSMParams:
    """Fit residues to the lags from ``width`` on by least squares; window taps correct the lags before.

    The residues of the tail times lam^-P are no alternative: a pole that has decayed by lag P would get a
    huge residue. Singular values below ``smallest_gain`` of the largest, which belong to such poles, are
    dropped.
    """
    channels = k.shape[0]
    params = SSMParams(
        k.new_zeros(channels, width, dtype=torch.float64),
        poles,
        k.new_zeros(channels, 2, poles.shape[-1], dtype=torch.float64),
    )
    for part, block in channel_blocks(k):
        own = params.channels_of(part)
        powers = pole_powers(own.poles, k.shape[1])[..., width:]
        basis = torch.cat((powers.select(-3, 0), -powers.select(-3, 1)), dim=-2)
        left, sigma, right = torch.linalg.svd(basis, full_matrices=False)
        usable = sigma > smallest_gain * sigma[..., :1]
        inverse = torch.where(usable, 1 / sigma.where(usable, torch.ones_like(sigma)), 0.0)
        weights = (block[:, None, width:] @ right.mT) * inverse.unsqueeze(-2) @ left.mT
        params.residues[part] = weights.reshape(-1, 2, poles.shape[-1])
        params.window[part] = block[:, :width] - params.channels_of(part).taps(width)
    return params


def _modal(realization: Realization, order: int) -> tuple[Tensor, Tensor]:
    """Return poles (G, M), one per conjugate pair, and the map (G, N, M) from output weights to residues."""
    matrix = realization.truncated(order)
    lam, vectors = torch.linalg.eig(matrix)
    start = realization.start[:, :order].to(lam.dtype)
    gain = torch.linalg.solve(vectors, start.unsqueeze(2)).squeeze(2)
    kept = lam.imag >= 0
    # Poles with a negative imaginary part are sorted to the end and zeroed; the weight of their conjugates
    # is doubled instead.
    index = torch.argsort(kept.int(), dim=1, descending=True, stable=True)[:, : int(kept.sum(1).max())]
    weight = torch.where(lam.imag > 0, 2.0, 1.0) * kept
    modal = vectors * (gain * weight).unsqueeze(1)
    lam = (lam * kept).gather(1, index)
    return lam, modal.gather(2, index.unsqueeze(1).expand(-1, modal.shape[1], -1))
