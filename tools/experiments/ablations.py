"""What ETSC does without its ideas (section 4.4 of arXiv 2311.08756): for comparison, not for use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnnlm.conversion.etsc import roots_of_unity
from tnnlm.ops.ssm import SSMParams


def without_balancing(k: Tensor) -> SSMParams:
    """ETSC without the tap that balances the sum: the n-point DFT, whose constant mode stays.

    Exact at lags below n too, but the constant mode is a pole at 1 that never forgets: past n the
    kernel repeats with its mean, and rounding is carried forever.

    Args:
        k: taps (E, n) in float64.
    """
    n = k.shape[1]
    spectrum = torch.fft.rfft(k.double()) / n
    poles = roots_of_unity(n, k.device)
    weight = torch.full_like(poles[0], 2.0)
    # The constant mode, and at an even n the one at -1, have no partner.
    weight[0] = 1.0
    if n % 2 == 0:
        weight[-1] = 1.0
    residues = torch.stack((spectrum.real * weight, spectrum.imag * weight), dim=1)
    return SSMParams(residues.new_zeros(len(k), 0), poles, residues)


def vandermonde(k: Tensor, eigenvalues: str) -> tuple[SSMParams, float]:
    """Residues for n given eigenvalues, by solving the Vandermonde system of n taps.

    Args:
        k: taps (E, n) in float64.
        eigenvalues: ``real``, evenly spaced on (-1, 1), or ``random``, uniform in the unit disc.

    Returns:
        parameters in float64, and the condition number of the system: beyond 1e16 the solution
        means nothing.
    """
    n = k.shape[1]
    if eigenvalues == "real":
        poles = torch.linspace(-1, 1, n + 2, dtype=torch.float64)[1:-1].to(torch.complex128)
    else:
        generator = torch.Generator().manual_seed(0)
        radius = torch.rand(n, dtype=torch.float64, generator=generator).sqrt()
        poles = torch.polar(radius, 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator))
    poles = poles.to(k.device)
    matrix = poles[None, :] ** torch.arange(n, device=k.device)[:, None]
    condition = float(torch.linalg.cond(matrix))
    # Least squares: where the system is singular to rounding, an exact solver would overflow.
    residues = torch.linalg.lstsq(matrix, k.T.to(torch.complex128), driver="gelsd").solution.T
    planes = torch.view_as_real(residues).transpose(1, 2).contiguous()
    return SSMParams(planes.new_zeros(len(k), 0), torch.view_as_real(poles).T.contiguous(), planes), condition
