"""Toeplitz products by FFT, for every channel: causal, y[t] = sum_{i=0..t} k[i] x[t-i], and two-sided,
y[t] = sum_s k[t-s] x[s].

Pure functions; the only place that knows FFT layouts. Log-linear in length. Equation 1 of
arXiv 2305.04749. The slow twins are ``toeplitz_dense`` and ``toeplitz_two_sided_dense`` of ``ops.reference``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tnnlm.precision import working_dtype

CACHE_BYTES = 1 << 21
"""of spectrum per tile: on a CPU it should stay in the cache"""


def fft_length(minimum: int) -> int:
    """Smallest even 2^a 3^b 5^c that is at least ``minimum``: a size every FFT library is fast at."""
    best = 1 << max(1, (minimum - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            size = three * 2
            while size < minimum:
                size *= 2
            best = min(best, size)
            three *= 3
        five *= 5
    return best


def toeplitz(x: Tensor, k: Tensor) -> Tensor:
    """Causal convolution of every channel of ``x`` with its own taps.

    The transforms run in float32 (float64 for float64 inputs) whatever the autocast state:
    bf16 has no FFT. Once differentiable in both arguments.

    Args:
        x: inputs (B, L, E).
        k: taps (E, K), index = lag. Lags from L on can't matter and are ignored; K < L means
            zeros from K on.

    Returns:
        outputs (B, L, E) in the dtype of ``x``, laid out in memory as ``x`` is: no layout is wrong, that
        of (E, B, L) is fastest.

    Raises:
        ValueError: if the channels of ``x`` and ``k`` differ, or either is empty.
    """
    _check_shapes(x, k)
    length = x.shape[1]
    k = k[:, :length]
    y = _circular_conv(x.permute(2, 0, 1), k, fft_length(length + k.shape[1] - 1))[0]
    return y.permute(1, 2, 0)


def toeplitz_two_sided(x: Tensor, k: Tensor) -> Tensor:
    """Convolution of every channel of ``x`` with taps at negative lags too: y[t] = sum over s of k[t-s] x[s].

    Precision and layouts as of :func:`toeplitz`, and no larger transforms: negative lags stand at the end of
    the circle. Inputs that are padding have to be zero: then they reach no output.

    Args:
        x: inputs (B, L, E).
        k: taps (E, 2K - 1), of lags -(K-1) .. K-1 in order; lag 0 in the middle. Lags beyond L - 1 on either
            side can't matter and are ignored; K < L means zeros beyond.

    Returns:
        outputs (B, L, E) in the dtype of ``x``, laid out in memory as ``x`` is.

    Raises:
        ValueError: if the channels of ``x`` and ``k`` differ, either is empty, or the number of taps is even.
    """
    _check_shapes(x, k)
    if k.shape[1] % 2 == 0:
        raise ValueError(f"expected taps of lags -(K-1) .. K-1, got an even number of them, {k.shape[1]}")
    side = min(x.shape[1], (k.shape[1] + 1) // 2)
    n = fft_length(x.shape[1] + side - 1)
    centre = k.shape[1] // 2
    past, future = k[:, centre : centre + side], k[:, centre - side + 1 : centre]
    circle = torch.cat((past, k.new_zeros(len(k), n - 2 * side + 1), future), dim=1)
    y = _circular_conv(x.permute(2, 0, 1), circle, n)[0]
    return y.permute(1, 2, 0)


def _check_shapes(x: Tensor, k: Tensor) -> None:
    if x.dim() != 3 or k.dim() != 2 or x.shape[2] != k.shape[0]:
        raise ValueError(f"expected x (B, L, E) and k (E, K), got {tuple(x.shape)} and {tuple(k.shape)}")
    if x.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError("a Toeplitz product needs at least one token and one tap")


def toeplitz_direct(x: Tensor, k: Tensor) -> Tensor:
    """What :func:`toeplitz` returns, summed lag by lag: for few taps, where no gradient is asked for.

    As a depthwise convolution on (B, L, E) as it lies, without a transform: on a CPU, in float32 and for 64
    tokens and taps, six times as fast as by FFT.

    Args:
        x: inputs (B, L, E), L at least 1.
        k: taps (E, K), K at least 1.
    """
    taps = min(x.shape[1], k.shape[1])
    padded = torch.nn.functional.pad(x, (0, 0, taps - 1, 0)).transpose(1, 2).unsqueeze(2)
    weight = k[:, :taps].flip(1)[:, None, None]
    return torch.nn.functional.conv2d(padded, weight, groups=len(k)).squeeze(2).transpose(1, 2)


def fft_convolution(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the op ``tnnlm::circular_conv`` returns, in one piece and in PyTorch's own operations: an exported
    program goes where ours is not known."""
    dtype = _dtype(x, k)
    k_spectrum = torch.fft.rfft(k.to(dtype), n=n, norm="forward")
    x_spectrum = torch.fft.rfft(x.to(dtype), n=n)
    y = _inverse(x_spectrum * k_spectrum[:, None], n)[..., : x.shape[2]]
    return y.to(x.dtype), x_spectrum, k_spectrum


@torch.library.custom_op("tnnlm::circular_conv", mutates_args=())
def _circular_conv(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of x (E, B, L) and k (E, K) on a circle of n points, both padded by zeros: its first L
    outputs, and the spectra of both for the backward pass.

    An op of our own: autograd's graph of rfft/irfft transforms complex-to-complex in backward and keeps
    four more buffers, and a compiler breaks its graph at complex numbers, where it can take this as a whole.
    Two transforms a pass; the taps' gradient is summed over the batch before the inverse one. It
    works on a tile of the channels at a time, so that on a CPU transform, product and inverse meet in the
    cache.
    """
    dtype = _dtype(x, k)
    k_spectrum = torch.fft.rfft(k.to(dtype), n=n, norm="forward")
    x_spectrum = k_spectrum.new_empty(*x.shape[:2], n // 2 + 1)
    y = torch.empty_like(x)
    for tile, padded in _tiles(x, n, dtype):
        spectrum = torch.fft.rfft(padded, out=x_spectrum[tile])
        y[tile] = _inverse(spectrum * k_spectrum[tile, None], n)[..., : x.shape[2]]
    return y, x_spectrum, k_spectrum


@torch.library.custom_op("tnnlm::circular_conv_backward", mutates_args=())
def _circular_conv_backward(
    grad: Tensor, x_spectrum: Tensor, k_spectrum: Tensor, n: int, taps: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs, as ``grad`` (E, B, L), and of ``taps`` taps."""
    x_grad = torch.empty_like(grad)
    k_sum = torch.empty_like(k_spectrum)
    for tile, padded in _tiles(grad, n, x_spectrum.real.dtype):
        spectrum = torch.fft.rfft(padded)
        torch.sum(spectrum * x_spectrum[tile].conj(), dim=1, out=k_sum[tile])
        spectrum *= k_spectrum[tile, None].conj()
        x_grad[tile] = _inverse(spectrum, n)[..., : grad.shape[2]]
    return x_grad, torch.fft.irfft(k_sum, n=n)[:, :taps].contiguous()


def _inverse(spectrum: Tensor, n: int) -> Tensor:
    """The inverse transform of a product with ``k_spectrum``, which was divided by n already: taps are fewer
    than inputs."""
    return torch.fft.irfft(spectrum, n=n, norm="forward")


def _dtype(x: Tensor, k: Tensor) -> torch.dtype:
    """The real dtype that the transforms run in."""
    return torch.promote_types(working_dtype(x.dtype), working_dtype(k.dtype))


@_circular_conv.register_fake
def _(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    spectrum = k.new_empty(k.shape[0], n // 2 + 1, dtype=_dtype(x, k).to_complex())
    return torch.empty_like(x), spectrum.new_empty(*x.shape[:2], n // 2 + 1), spectrum


@_circular_conv_backward.register_fake
def _(grad: Tensor, x_spectrum: Tensor, k_spectrum: Tensor, n: int, taps: int) -> tuple[Tensor, Tensor]:
    k_grad = k_spectrum.new_empty(k_spectrum.shape[0], taps, dtype=k_spectrum.real.dtype)
    return torch.empty_like(grad), k_grad


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, k, ctx.n = inputs
    ctx.k_dtype, ctx.taps = k.dtype, k.shape[1]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
    x_grad, k_grad = _circular_conv_backward(grad, *ctx.saved_tensors, ctx.n, ctx.taps)
    return x_grad, k_grad.to(ctx.k_dtype), None


_circular_conv.register_autograd(_gradients, setup_context=_keep)


def _tiles(x: Tensor, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Channels of x (E, B, L) to transform at a time, and they as ``dtype``, padded to ``n`` by zeros: a
    buffer that the next tile reuses."""
    channels, batch, length = x.shape
    width = channels
    if x.device.type == "cpu":
        width = max(4, CACHE_BYTES // (8 * batch * (n // 2 + 1)))
    buffer = x.new_zeros(min(width, channels), batch, n, dtype=dtype)
    for start in range(0, channels, width):
        tile = slice(start, min(start + width, channels))
        padded = buffer[: tile.stop - start]
        padded[..., :length] = x[tile]
        yield tile, padded
