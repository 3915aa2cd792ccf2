"""Division by a polynomial 1 + a(z), by which companion recurrences are run in parallel, and its roots.

The quotient w of x, (1 + a(z)) w(z) = x(z), obeys w[t] = x[t] - sum_{i=1..n} a[i] w[t-i]. When poles lie
close together, w and the inverse of 1 + a grow to many times what x is, and products with powers of the state
matrix or with that inverse lose every digit. Forward substitution doesn't: it repeats the arithmetic of the
recurrence. Its blocks are solved for all channels and rows at once; what a block adds to later ones is a
Toeplitz product with a alone. Dimensions: G polynomials, R rows that share one, L length, n degree.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnnlm.ops.toeplitz import toeplitz

_BLOCK = 32
"""Values per block on a CPU, for which the triangular matrices of 768 channels stay in the cache."""
_BLOCK_GPU = 128
"""Values per block on a GPU, where the time is that of starting kernels."""
_BISECTIONS = 30
"""Number of bisections for the largest modulus of a pole, which give it to 1e-9."""


def divide(x: Tensor, a: Tensor, past: Tensor | None = None) -> Tensor:
    """Return the quotient of the series x and 1 + a(z).

    Time is O(L log(n)^2) and memory O(L) per row, besides the triangular matrix of one block per polynomial.
    Every value depends on earlier ones only, also in rounding: its error is relative to their size and not to
    that of later values.

    Args:
        x: Coefficients of the series, (G, R, L), L at least 1.
        a: Coefficients a[1] .. a[n] of the polynomials, (G, n).
        past: The last n values of w before x, oldest first, (G, R, n); None means zeros.

    Returns:
        First coefficients of the quotient, (G, R, L), in float64.
    """
    x, a = x.double(), a.double()
    size = min(x.shape[2], _BLOCK if x.device.type == "cpu" else _BLOCK_GPU)
    lags = torch.arange(size, device=x.device)
    lags = (lags[:, None] - lags).clamp(min=0)
    whole = pad(a[:, : size - 1], (1, max(0, size - 1 - a.shape[1])))
    # Neither the diagonal, which is 1, nor what is above is read.
    triangle = whole[:, lags]
    return _blocks(x, triangle, a) if past is None else _blocks_after(past.double(), x, triangle, a)


def _blocks(x: Tensor, triangle: Tensor, a: Tensor) -> Tensor:
    """Divide (G, R, L) after zeros: first one half, then the other with the first as its past."""
    length, size = x.shape[2], triangle.shape[1]
    if length <= size:
        part = triangle[:, :length, :length]
        return torch.linalg.solve_triangular(part, x.mT, upper=False, unitriangular=True).mT
    half = size * ((length + size - 1) // size // 2)
    first = _blocks(x[..., :half], triangle, a)
    second = _blocks_after(first[..., -a.shape[1] :], x[..., half:], triangle, a)
    return torch.cat((first, second), dim=2)


def _blocks_after(past: Tensor, x: Tensor, triangle: Tensor, a: Tensor) -> Tensor:
    """Divide (G, R, L) after the values ``past`` (G, R, at most n), oldest first."""
    known, reach = past.shape[2], min(a.shape[1], x.shape[2])
    # They act on the next n values as these inputs would, from zero initial values.
    old = pad(past, (0, reach)).permute(1, 2, 0)
    echo = toeplitz(old, pad(a, (1, 0)))[:, known:].permute(2, 0, 1)
    return _blocks(torch.cat((x[..., :reach] - echo, x[..., reach:]), dim=2), triangle, a)


def pole_radius(a: Tensor) -> Tensor:
    """Return the largest modulus of the roots of z^n + a[1] z^(n-1) + .. + a[n], (G, n) -> (G,).

    It is found by bisection at O(n^2) per step, compared with O(n^3) for eigenvalues: all roots of the
    polynomial in r z are inside the unit circle (Schur-Cohn test) if and only if r exceeds this modulus.
    """
    a = a.double()
    inside = _schur_cohn(a)
    low = torch.where(inside, 0.0, 1.0).to(a)
    # Cauchy's bound.
    high = torch.where(inside, 1.0, 1.0 + a.abs().amax(1))
    exponents = torch.arange(1, a.shape[1] + 1, dtype=a.dtype, device=a.device)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = _schur_cohn(a / middle[:, None] ** exponents)
        low, high = torch.where(below, low, middle), torch.where(below, middle, high)
    return high


def _schur_cohn(a: Tensor) -> Tensor:
    """Return whether all roots are inside the unit circle, (G, n) -> (G,).

    By Schur and Cohn, this holds if and only if all reflection coefficients are inside it.
    """
    inside = torch.ones(len(a), dtype=torch.bool, device=a.device)
    while a.shape[1]:
        reflection, rest = a[:, -1:], a[:, :-1]
        inside = inside & (reflection.abs() < 1).squeeze(1)
        # Polynomials that failed need no further test. A comparison with NaN is False, so NaN fails.
        reflection = torch.where(inside[:, None], reflection, 0.0)
        a = (rest - reflection * rest.flip(1)) / (1 - reflection.square())
    return inside
