"""Balanced reduction: a few shared poles that serve every channel, within sight of the AAK bound.

All channels of a layer share the position network's last features, so the taps have low rank and
one small set of poles fits them all:

1. compress the taps k (E, T) to their leading combinations of channels f (R, T);
2. the leading right singular vectors V of the block Hankel matrix of f are the states that matter;
   shifting them by one lag is the state matrix, A = V[1:]^T V[:-1] (Kung 1978; Ho and Kalman 1966).
   For taps that die out A is a contraction: no pole leaves the unit circle;
3. output weights by least squares on the taps of every channel, then modal form: poles, residues;
   where window taps absorb the first lags all this is done on the lags behind them;
4. the smallest order whose measured error meets the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.conversion.linalg import channel_blocks, compress, hankel_svd
from tnnlm.errors import UserError
from tnnlm.ops.powers import pole_powers
from tnnlm.ops.ssm import SSMParams

RANK = 128
"""combinations of channels that choose the poles"""
MAX_ORDER = 128
"""largest order that a tolerance is sought with"""
_STATE_BYTES = 1 << 28
"""of states of per-channel problems at a time"""
_SMALLEST_GAIN = 1e-4
"""singular values behind the window, over the largest, below which residues would cancel in float32"""
_SAMPLE = 8
"""channels that are tried first where each has poles of its own"""
LARGEST_POLE = 1 - 1e-7
"""poles are kept inside: the recurrence must forget its rounding"""


@dataclass(frozen=True)
class Realization:
    """States of the leading orders, G problems at once: x[0] = start, x[i + 1] = A x[i], f[i] = C x[i]."""

    matrix: Tensor
    """A, (G, q, q); its leading N x N part is the one of order N"""
    start: Tensor
    """x[0], (G, q)"""
    sigma: Tensor
    """Hankel singular values, (G, q)"""

    def states(self, order: int, length: int) -> Tensor:
        """x[0 .. length - 1] at an order, (G, length, order), by repeated doubling."""
        power = self.truncated(order)
        x = self.start[:, None, :order]
        while x.shape[1] < length:
            x = torch.cat((x, x @ power.transpose(1, 2)), dim=1)
            power = power @ power
        return x[:, :length]

    def truncated(self, order: int) -> Tensor:
        """The state matrix of an order, (G, N, N), its poles inside the unit circle."""
        matrix = self.matrix[:, :order, :order]
        poles, vectors = torch.linalg.eig(matrix)
        radius = poles.abs()
        if bool((radius <= LARGEST_POLE).all()):
            return matrix
        # Reflect what is outside, then shrink what is on the circle.
        inside = torch.where(radius > 1, poles / radius.square(), poles)
        inside = inside * (LARGEST_POLE / inside.abs()).clamp(max=1)
        return torch.linalg.solve(vectors, vectors * inside.unsqueeze(1), left=False).real


def realize(f: Tensor, max_order: int, finite: bool = False) -> Realization:
    """States of the taps f (G, R, T) up to ``max_order``.

    Taps that have died out by T, or are ``finite``, are taken as zero from there on. Of others nothing
    is assumed: half of them are outputs that the other half predicts, and A is fitted by least squares.
    """
    length = f.shape[2]
    energy = f.square().sum((0, 1))
    dead = finite or bool(energy[-max(1, length // 8) :].sum() <= 1e-6 * energy.sum())
    columns = length if dead else max(1, length // 2)
    # As many states as columns would leave the shift undetermined.
    largest = max_order if dead else max(1, min(max_order, columns // 2))
    sigma, v = hankel_svd(f, largest, columns)
    before, after = v[:, :-1], v[:, 1:]
    if dead:
        matrix = after.transpose(1, 2) @ before
    else:
        matrix = torch.linalg.lstsq(before, after).solution.transpose(1, 2)
    return Realization(matrix, v[:, 0], sigma)


def balanced(
    k: Tensor,
    *,
    order: int | None = None,
    tolerance: float = 1e-3,
    poles: str = "shared",
    window_taps: int = 0,
    finite: bool = False,
) -> SSMParams:
    """Reduce taps to a recurrence of small order.

    Args:
        k: taps (E, T), finite, long enough to hold what matters of the kernel.
        order: real state numbers per channel, window taps included, at most T; None takes the
            smallest that meets ``tolerance``.
        tolerance: largest relative error ||k - k^|| / ||k|| (Frobenius norm); of the worst channel
            where poles are per channel.
        poles: ``shared`` by all channels, or one set per ``channel`` for kernels whose channels
            have nothing in common.
        window_taps: P < T, the first lags that a window of the last inputs takes over exactly.
        finite: whether the taps are zero from T on even if the last ones are not small.

    Returns:
        parameters in float64.

    Raises:
        UserError: if no order up to ``MAX_ORDER`` meets the tolerance; says what was reached.
    """
    tail = k[:, window_taps:]
    modes = None if order is None else order - window_taps
    if poles == "shared":
        # The whole is one problem: norms of all channels together.
        norms = [torch.stack([block.norm() for _, block in channel_blocks(x)]).norm() for x in (tail, k)]
        problem = Problem(compress(tail, RANK).unsqueeze(0), norms[0][None], norms[1][None], finite)
        realization, n = _fit(problem, modes, tolerance)
        params = _shared(realization, n, tail)
    else:
        if order is None and len(k) > _SAMPLE:
            # A few channels show at once, where all of them would take minutes, that nothing fits.
            chosen = torch.linspace(0, len(k) - 1, _SAMPLE, device=k.device).round().long()
            balanced(k[chosen], tolerance=tolerance, poles=poles, window_taps=window_taps, finite=finite)
        width = max(1, _STATE_BYTES // (8 * k.shape[1] * MAX_ORDER))
        fits = []
        for whole in k.split(width):
            f = whole[:, None, window_taps:].double()
            problem = Problem(f, f.flatten(1).norm(dim=1), whole.double().norm(dim=1), finite)
            fits.append((f, *_fit(problem, modes, tolerance)))
        n = max(found for _, _, found in fits)
        params = _per_channel([(f, realization) for f, realization, _ in fits], n)
    return _behind_window(k, params.poles, window_taps) if window_taps else params


class Problem(NamedTuple):
    """What is fitted, G problems at once."""

    f: Tensor
    """(combinations of) the taps behind the window, (G, R, T)"""
    norm: Tensor
    """(G,) of those taps, before they were combined"""
    whole: Tensor
    """(G,) of all taps: what errors are relative to"""
    finite: bool


def _fit(problem: Problem, order: int | None, tolerance: float) -> tuple[Realization, int]:
    """A realization and the order to use."""
    if order is not None:
        realization = realize(problem.f, order, problem.finite)
        return realization, min(order, realization.start.shape[1])
    tried, below, reached = 0, 0, 1.0
    for limit in (32, MAX_ORDER):
        realization = realize(problem.f, limit, problem.finite)
        largest = realization.start.shape[1]
        # Upwards: states beyond the taps' own rank are noise, and fit worse.
        while tried < largest:
            tried = min(max(tried + 1, tried * 3 // 2), largest)
            error = _error(problem, realization, tried)
            reached = min(reached, error)
            if error <= tolerance:
                return realization, _bisect(problem, realization, tolerance, below, tried)
            below = tried
    raise UserError(
        f"tolerance {tolerance:g} can't be met: order {tried} leaves a relative error of {reached:.1e}",
        "raise the tolerance, or use --method window, --window-taps, --poles channel or --method auto",
    )


def _bisect(problem: Problem, realization: Realization, tolerance: float, low: int, high: int) -> int:
    """The smallest order above ``low`` that meets the tolerance; ``high`` does."""
    while high - low > 1:
        middle = (low + high) // 2
        if _error(problem, realization, middle) <= tolerance:
            high = middle
        else:
            low = middle
    return high


def _error(problem: Problem, realization: Realization, order: int) -> float:
    """Relative error of the best fit at an order, of the worst problem: what the states don't span."""
    f = problem.f
    basis = torch.linalg.qr(realization.states(order, f.shape[2]))[0]
    missed = (f - (f @ basis) @ basis.transpose(1, 2)).square().sum((1, 2))
    left_out = (problem.norm.square() - f.square().sum((1, 2))).clamp(min=0)
    tiny = torch.finfo(torch.float64).tiny
    return float(((missed + left_out) / problem.whole.square().clamp(min=tiny)).max().sqrt())


def _shared(realization: Realization, order: int, k: Tensor) -> SSMParams:
    lam, modal = _modal(realization, order)
    states = realization.states(order, k.shape[1])[0]
    basis, upper = torch.linalg.qr(states)
    residues = k.new_empty(k.shape[0], 2, lam.shape[1], dtype=torch.float64)
    for part, block in channel_blocks(k):
        weights = torch.linalg.solve_triangular(upper, (block @ basis).T, upper=True).T
        residues[part] = torch.view_as_real(weights.to(modal.dtype) @ modal[0]).transpose(1, 2)
    poles = torch.view_as_real(lam[0]).T.contiguous()
    return SSMParams(residues.new_zeros(k.shape[0], 0), poles, residues)


def _per_channel(fits: list[tuple[Tensor, Realization]], order: int) -> SSMParams:
    poles, residues = [], []
    for f, realization in fits:
        lam, modal = _modal(realization, order)
        basis, upper = torch.linalg.qr(realization.states(order, f.shape[2]))
        weights = torch.linalg.solve_triangular(upper, (f @ basis).transpose(1, 2), upper=True)
        c = (weights.transpose(1, 2).to(modal.dtype) @ modal).squeeze(1)
        poles.append(torch.view_as_real(lam).transpose(1, 2))
        residues.append(torch.view_as_real(c).transpose(1, 2))
    modes = max(part.shape[2] for part in poles)
    # Channels with more real poles have more modes: the others get modes that do nothing.
    padded = [
        torch.cat([torch.nn.functional.pad(part, (0, modes - part.shape[2])) for part in parts])
        for parts in (poles, residues)
    ]
    return SSMParams(padded[1].new_zeros(len(padded[1]), 0), *padded)


def _behind_window(k: Tensor, poles: Tensor, width: int) -> SSMParams:
    """Residues by least squares on the lags from ``width`` on; the window takes what they leave before.

    Not lam^-P times those of the tail: a pole that is dead by lag P would get a residue as large as its
    power is small. The singular values that belong to such poles are dropped.
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
        usable = sigma > _SMALLEST_GAIN * sigma[..., :1]
        inverse = torch.where(usable, 1 / sigma.where(usable, torch.ones_like(sigma)), 0.0)
        weights = (block[:, None, width:] @ right.mT) * inverse.unsqueeze(-2) @ left.mT
        params.residues[part] = weights.reshape(-1, 2, poles.shape[-1])
        params.window[part] = block[:, :width] - params.channels_of(part).taps(width)
    return params


def _modal(realization: Realization, order: int) -> tuple[Tensor, Tensor]:
    """Poles (G, M), one of each conjugate pair, and the map (G, N, M) from output weights to residues."""
    matrix = realization.truncated(order)
    lam, vectors = torch.linalg.eig(matrix)
    start = realization.start[:, :order].to(lam.dtype)
    gain = torch.linalg.solve(vectors, start.unsqueeze(2)).squeeze(2)
    kept = lam.imag >= 0
    # Those of a pair that are dropped go last and become zero; a kept one stands for both.
    index = torch.argsort(kept.int(), dim=1, descending=True, stable=True)[:, : int(kept.sum(1).max())]
    weight = torch.where(lam.imag > 0, 2.0, 1.0) * kept
    modal = vectors * (gain * weight).unsqueeze(1)
    lam = (lam * kept).gather(1, index)
    return lam, modal.gather(2, index.unsqueeze(1).expand(-1, modal.shape[1], -1))
