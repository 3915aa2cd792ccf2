"""Block Hankel matrices of taps, by FFT and randomised linear algebra: never formed.

The block Hankel matrix of taps f (R, T) has the block f[:, i + j] in row i and column j, zeros
where i + j >= T. It maps past inputs to future outputs. Its singular values bound every
recurrence: none of order N has a Hankel-norm error below the (N+1)-st (Adamyan, Arov, Krein 1971).
A leading axis G holds independent problems: one per channel, or a single one for all channels.
Float64 algebra on 16,384 x 16,384 float32 taps fits in a few gigabytes: channels are taken in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tnnlm.ops.toeplitz import fft_length

CHANNELS = 256
"""channels that are held in float64 at a time"""
_SPECTRUM_BYTES = 1 << 25
"""of spectra at a time"""
_ITERATIONS = 4
"""of subspace iteration: Hankel singular values fall fast"""


def channel_blocks(k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Taps (E, T) in float64, some channels at a time: 16,384 x 16,384 taps take 2 GB in all."""
    for start in range(0, k.shape[0], CHANNELS):
        part = slice(start, min(start + CHANNELS, k.shape[0]))
        yield part, k[part].double()


def compress(k: Tensor, rank: int, drop: float = 1e-6) -> Tensor:
    """The leading combinations of channels, (R, T) in float64, by randomised SVD.

    Orthonormal combinations keep norms, singular values of the Hankel matrix and its right
    singular vectors, so far as the rest of the taps is small. Halko, Martinsson, Tropp 2011.

    Args:
        k: taps (E, T).
        rank: R at the most.
        drop: share of the norm that may be left out for a smaller R.
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
    # Ascending: what is left out is a beginning of the cumulated energies.
    needed = int((energy.clamp(min=0).cumsum(0) > drop**2 * energy.sum()).sum())
    return left.flip(1).T[: max(1, min(rank, needed))] @ small


def sum_over_channels(k: Tensor, weights: Tensor) -> Tensor:
    """k^T weights: (E, T), (E, q) -> (T, q), some channels at a time."""
    total = torch.zeros(k.shape[1], weights.shape[1], dtype=torch.float64, device=k.device)
    for part, block in channel_blocks(k):
        total.addmm_(block.T, weights[part])
    return total


def gram_product(f: Tensor, x: Tensor) -> Tensor:
    """H^T H x for taps f (G, R, T) and x (G, W, q), in float64.

    With W = T columns the taps are zero from T on; with fewer, H has the T - W + 1 rows that are
    known to the end.
    """
    length, columns = f.shape[2], x.shape[1]
    rows = length if columns == length else length - columns + 1
    n = fft_length(2 * length)
    spectrum = torch.fft.rfft(f, n=n)
    width = max(1, _SPECTRUM_BYTES // (16 * spectrum.numel()))
    parts = []
    for block in x.transpose(1, 2).split(width, dim=1):
        # Correlations: (H x)[i] = sum_j f[i + j] x[j], and the same once more with the outputs.
        image = torch.fft.irfft(spectrum.unsqueeze(2) * torch.fft.rfft(block, n=n).conj().unsqueeze(1), n=n)
        seen = torch.fft.rfft(image[..., :rows], n=n).conj()
        back = torch.fft.irfft((spectrum.unsqueeze(2) * seen).sum(1), n=n)
        parts.append(back[..., :columns])
    return torch.cat(parts, dim=1).transpose(1, 2)


def hankel_svd(f: Tensor, rank: int, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """Leading Hankel singular values (G, q) and right singular vectors (G, W, q) of taps f (G, R, T).

    Args:
        f: taps in float64.
        rank: how many are wanted; q is that or W.
        columns: W, columns of the Hankel matrix; T if None.
    """
    groups, _, length = f.shape
    width = columns or length
    wanted = min(rank, width)
    sampled = min(rank + 16, width)
    generator = torch.Generator(f.device).manual_seed(0)
    x = torch.randn(groups, width, sampled, dtype=torch.float64, device=f.device, generator=generator)
    for _ in range(_ITERATIONS):
        x = torch.linalg.qr(gram_product(f, x))[0]
    small = x.transpose(1, 2) @ gram_product(f, x)
    energy, rotation = torch.linalg.eigh((small + small.transpose(1, 2)) / 2)
    sigma = energy.clamp(min=0).sqrt().flip(1)[:, :wanted]
    return sigma, (x @ rotation.flip(2))[..., :wanted]
