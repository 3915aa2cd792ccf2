"""Powers of poles, and the taps of modes; complex numbers are pairs of real planes (re, im).

Dimensions: E channels, N modes, L lags.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pole_powers(poles: Tensor, length: int) -> Tensor:
    """Return lam^0 .. lam^(length-1) as planes, (2, N, length) or (E, 2, N, length), in float64.

    The powers are computed by repeated squaring. The relative error doubles with each squaring, up to about
    ``length`` float64 roundings.
    """
    squares = [torch.complex(*poles.double().unbind(-2))]
    while 1 << len(squares) < length:
        squares.append(squares[-1] * squares[-1])
    return power_table(squares, length)


def power_table(squares: list[Tensor], length: int) -> Tensor:
    """Return lam^0 .. lam^(length-1) as planes, given lam^(2^j) for j = 0, 1, ..."""
    powers = torch.ones((*squares[0].shape, 1), dtype=squares[0].dtype, device=squares[0].device)
    for square in squares:
        powers = torch.cat((powers, powers * square.unsqueeze(-1)), dim=-1)
    powers = powers[..., :length]
    return torch.stack((powers.real, powers.imag), dim=-3)


def mode_taps(residues: Tensor, powers: Tensor) -> Tensor:
    """Return the taps Re sum_m c[m] lam[m]^i, (E, L), in the residues' dtype."""
    powers = powers.to(residues.dtype)
    signed = torch.stack((residues[:, 0], -residues[:, 1]), dim=1)
    if powers.dim() == 3:
        return signed.flatten(1) @ powers.flatten(0, 1)
    return torch.einsum("ecn,ecnl->el", signed, powers)
