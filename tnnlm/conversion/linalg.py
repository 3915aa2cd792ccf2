"""Randomised linear algebra on block Hankel matrices of taps, by FFT and without materialising them.

The block Hankel matrix of taps f (R, T) has the block f[:, i + j] in row i and column j, and zeros
where i + j >= T. It maps past inputs to future outputs. Its singular values bound every recurrence:
none of order N has a Hankel-norm error below the (N+1)-st (Adamyan, Arov, Krein 1971).
A leading axis G holds independent problems: one per channel, or a single one for all channels.
Channels are processed in blocks, so that float64 algebra on 16,384 x 16,384 float32 taps fits in a
few gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tnnlm.ops.toeplitz import fft_length

CHANNELS = 256
"""Number of channels that are converted to float64 at once."""
_SPECTRUM_BYTES = 1 << 25
"""Memory for the spectra that are computed at once, in bytes."""
_SAFE = (1e-100, 1e100)
"""Range of the largest tap in which float64 neither overflows nor underflows in sums of squares."""
_DENSE = 256
"""Number of columns up to which all singular values of a Hankel matrix are computed."""
_ITERATIONS = 4
"""Number of subspace iterations. A few suffice, because Hankel singular values decay fast."""


def channel_blocks(k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of channels with their taps in float64, of taps (E, T).

    Blocks limit the memory, because all of 16,384 x 16,384 taps take 2 GB in float64.
    """
    for start in range(0, k.shape[0], CHANNELS):
        part = slice(start, min(start + CHANNELS, k.shape[0]))
        yield part, k[part].double()


def power_of_two(k: Tensor) -> float:
    """Return a power of two by which to divide taps, exactly, so that their squares stay in range.

    It is 1 unless the largest tap is outside ``_SAFE``.
    """
    low, high = torch.aminmax(k)
    largest = max(-float(low), float(high))
    if largest == 0 or not math.isfinite(largest) or _SAFE[0] <= largest <= _SAFE[1]:
        return 1.0
    return 2.0 ** max(math.frexp(largest)[1] - 1, -1022)


def row_scales(k: Tensor) -> Tensor:
    """Return a power of two per channel, (E, 1) in float64, at most the largest tap of that channel; 1 if it
    is zero or not finite."""
    peak = k.abs().amax(1, keepdim=True).double()
    exponent = torch.frexp(peak).exponent - 1
    scales = torch.ldexp(torch.ones_like(peak), exponent)
    return scales.where((peak > 0) & torch.isfinite(peak), torch.ones_like(peak))


def compress(k: Tensor, rank: int, drop: float = 1e-6) -> Tensor:
    """Return the leading linear combinations of channels, (R, T) in float64, by randomised SVD.

    The method is that of Halko, Martinsson and Tropp (2011). The combinations are orthonormal, so norms,
    singular values of the Hankel matrix and its right singular vectors are preserved, up to the part of
    the taps that is dropped.

    Args:
        k: Taps (E, T).
        rank: Largest number of combinations R.
        drop: Largest share of the norm to drop in favour of a smaller R.
    """
    channels, length = k.shape
    generator = torch.Generator(k.device).manual_seed(0)
    width = min(rank + 16, channels, length)
    basis = torch.randn(length, width, dtype=torch.float64, device=k.device, generator=generator)
    for _ in range(2):
        image = torch.cat([block @ basis for _, block in channel_blocks(k)])
        image = torch.linalg.qr(image)[0]
        basis = sum_over_channels(k, image)
        basis = torch.linalg.qr(basis)[0]
    image = torch.linalg.qr(torch.cat([block @ basis for _, block in channel_blocks(k)]))[0]
    small = sum_over_channels(k, image).T
    energy, left = torch.linalg.eigh(small @ small.T)
    # Energies are in ascending order: combinations whose cumulative energy is small are dropped.
    needed = int((energy.clamp(min=0).cumsum(0) > drop**2 * energy.sum()).sum())
    return left.flip(1).T[: max(1, min(rank, needed))] @ small


def sum_over_channels(k: Tensor, weights: Tensor) -> Tensor:
    """Return k^T weights, (T, q), for taps (E, T) and weights (E, q), computed in blocks of channels."""
    total = torch.zeros(k.shape[1], weights.shape[1], dtype=torch.float64, device=k.device)
    for part, block in channel_blocks(k):
        total.addmm_(block.T, weights[part])
    return total


def gram_product(f: Tensor, x: Tensor) -> Tensor:
    """Return H^T H x in float64, for the Hankel matrix H of taps f (G, R, T) and x (G, W, q).

    With W = T columns, the taps are taken as zero from lag T on. With fewer columns, H has only the
    T - W + 1 rows whose entries are all known.
    """
    length, columns = f.shape[2], x.shape[1]
    rows = length if columns == length else length - columns + 1
    n = fft_length(2 * length)
    spectrum = torch.fft.rfft(f, n=n)
    width = max(1, _SPECTRUM_BYTES // (16 * spectrum.numel()))
    parts = []
    for block in x.transpose(1, 2).split(width, dim=1):
        # Both products are correlations: (H x)[i] = sum_j f[i + j] x[j], and likewise for H^T.
        image = torch.fft.irfft(spectrum.unsqueeze(2) * torch.fft.rfft(block, n=n).conj().unsqueeze(1), n=n)
        seen = torch.fft.rfft(image[..., :rows], n=n).conj()
        back = torch.fft.irfft((spectrum.unsqueeze(2) * seen).sum(1), n=n)
        parts.append(back[..., :columns])
    return torch.cat(parts, dim=1).transpose(1, 2)


def hankel_svd(
    f: Tensor, rank: int, columns: int | None = None, iterations: int = _ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Return leading Hankel singular values (G, q) and right singular vectors (G, W, q) of taps f (G, R, T).

    Singular values are never overestimated, up to rounding.

    Args:
        f: Taps in float64.
        rank: Number of singular values to return, q = min(rank, W).
        columns: Number of columns W of the Hankel matrix; None takes T.
        iterations: Number of subspace iterations.
    """
    groups, _, length = f.shape
    width = columns or length
    kept = min(rank, width)
    sampled = min(rank + 16, width)
    generator = torch.Generator(f.device).manual_seed(0)
    x = torch.randn(groups, width, sampled, dtype=torch.float64, device=f.device, generator=generator)
    for _ in range(iterations):
        x = torch.linalg.qr(gram_product(f, x))[0]
    small = x.transpose(1, 2) @ gram_product(f, x)
    energy, rotation = torch.linalg.eigh((small + small.transpose(1, 2)) / 2)
    sigma = energy.clamp(min=0).sqrt().flip(1)[:, :kept]
    return sigma, (x @ rotation.flip(2))[..., :kept]


def hankel_singular_values(f: Tensor, count: int, columns: int) -> Tensor:
    """Return the leading ``count`` Hankel singular values of taps f (R, T), largest first.

    Up to ``_DENSE`` columns they are those of the whole matrix, else of a random subspace, which
    underestimates them slightly.
    """
    if columns > _DENSE:
        return hankel_svd(f.unsqueeze(0), count, columns, 2 * _ITERATIONS)[0][0]
    whole = torch.eye(columns, dtype=torch.float64, device=f.device).unsqueeze(0)
    gram = gram_product(f.unsqueeze(0), whole)[0]
    return torch.linalg.eigvalsh((gram + gram.T) / 2).clamp(min=0).sqrt().flip(0)[:count]
