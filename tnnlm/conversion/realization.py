"""Realization of taps as the states of a linear system, by the Ho-Kalman method.

Step 2 of :mod:`tnnlm.conversion.balanced` (Ho and Kalman 1966; Kung 1978).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnnlm.conversion.linalg import hankel_svd

LARGEST_POLE = 1 - 1e-7
"""Largest modulus of a pole. It is below 1 so that rounding errors in the state decay."""


@dataclass(frozen=True)
class Realization:
    """States of a linear system, for G problems at once: x[0] = start, x[i + 1] = A x[i], f[i] = C x[i].

    The leading N states are the realization of order N.
    """

    matrix: Tensor
    """State matrices A, (G, q, q). The leading N x N block is the state matrix of order N."""
    start: Tensor
    """Initial states x[0], (G, q)."""
    sigma: Tensor
    """Hankel singular values, (G, q), largest first."""

    def states(self, order: int, length: int) -> Tensor:
        """Return the states x[0 .. length - 1] at an order, (G, length, order), by repeated doubling."""
        power = self.truncated(order)
        x = self.start[:, None, :order]
        while x.shape[1] < length:
            x = torch.cat((x, x @ power.transpose(1, 2)), dim=1)
            power = power @ power
        return x[:, :length]

    def truncated(self, order: int) -> Tensor:
        """Return the state matrix of an order, (G, N, N), with its poles inside the unit circle."""
        matrix = self.matrix[:, :order, :order]
        poles, vectors = torch.linalg.eig(matrix)
        radius = poles.abs()
        if bool((radius <= LARGEST_POLE).all()):
            return matrix
        # Reflect poles outside the unit circle, then shrink those on it.
        inside = torch.where(radius > 1, poles / radius.square(), poles)
        inside = inside * (LARGEST_POLE / inside.abs()).clamp(max=1)
        return torch.linalg.solve(vectors, vectors * inside.unsqueeze(1), left=False).real


def realize(f: Tensor, max_order: int, finite: bool = False) -> Realization:
    """Return the realization of taps f (G, R, T) with at most ``max_order`` states.

    Taps that are ``finite``, or have decayed by lag T, are taken as zero from lag T on. For other taps
    nothing is assumed past lag T: the Hankel matrix has T / 2 columns and only known entries, and A is
    fitted by least squares.
    """
    length = f.shape[2]
    energy = f.square().sum((0, 1))
    decayed = finite or bool(energy[-max(1, length // 8) :].sum() <= 1e-6 * energy.sum())
    columns = length if decayed else max(1, length // 2)
    # With as many states as columns the least-squares problem for A would be underdetermined.
    largest = max_order if decayed else max(1, min(max_order, columns // 2))
    sigma, v = hankel_svd(f, largest, columns)
    before, after = v[:, :-1], v[:, 1:]
    if decayed or columns == 1:
        matrix = after.transpose(1, 2) @ before
    else:
        matrix = torch.linalg.lstsq(before, after).solution.transpose(1, 2)
    # Singular vectors of taps that are all zero are arbitrary, and their A may not be diagonalisable.
    alive = (f != 0).flatten(1).any(1)
    return Realization(matrix * alive[:, None, None], v[:, 0] * alive[:, None], sigma)
