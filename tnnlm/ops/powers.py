"""Powers of poles, and the taps that modes add up to; complex numbers as planes (re, im) of real tensors.

Letters: E channels, N modes, L lags.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pole_powers(poles: Tensor, length: int) -> Tensor:
    """lam^0 .. lam^(length-1) as planes, (2, N, length) or (E, 2, N, length), in float64.

    By repeated squaring: a square's rounding doubles with the next, and is length float64 roundings
    in the end.
    """
    squares = [torch.complex(*poles.double().unbind(-2))]
    while 1 << len(squares) < length:
        squares.append(squares[-1] * squares[-1])
    return power_table(squares, length)


def power_table(squares: list[Tensor], length: int) -> Tensor:
    """lam^0 .. lam^(length-1) as planes from lam^(2^j), j = 0, 1, ..."""
    powers = torch.ones((*squares[0].shape, 1), dtype=squares[0].dtype, device=squares[0].device)
    for square in squares:
        powers = torch.cat((powers, powers * square.unsqueeze(-1)), dim=-1)
    powers = powers[..., :length]
    return torch.stack((powers.real, powers.imag), dim=-3)


def mode_taps(residues: Tensor, powers: Tensor) -> Tensor:
    """Re sum_m c[m] lam[m]^i, (E, L), in the residues' dtype."""
    powers = powers.to(residues.dtype)
    signed = torch.stack((residues[:, 0], -residues[:, 1]), dim=1)
    if powers.dim() == 3:
        return signed.flatten(1) @ powers.flatten(0, 1)
    return torch.einsum("ecn,ecnl->el", signed, powers)
