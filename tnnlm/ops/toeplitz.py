"""Toeplitz products of each channel by FFT (arXiv 2305.04749, equation 1), log-linear in the length.

They are causal, y[t] = sum_{i=0..t} k[i] x[t-i], or bidirectional, y[t] = sum_s k[t-s] x[s]. FFT layouts are
local to this module and to the backends of :mod:`tnnlm.ops.conv_backends`. The reference implementations are
``toeplitz_dense`` and ``toeplitz_two_sided_dense`` of :mod:`tnnlm.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tnnlm.ops import cudnn_conv
from tnnlm.ops.circular import register_gradients, transform_dtype
from tnnlm.ops.conv_backends import training_backend
from tnnlm.ops.row_windows import row_conv

CACHE_BYTES = 1 << 21
"""Size of the spectrum of a tile in bytes, small enough for the cache of a CPU."""


def fft_length(minimum: int) -> int:
    """Return the smallest even 2^a 3^b 5^c that is at least ``minimum``, a size for which FFTs are fast."""
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
    """Convolve each channel of ``x`` causally with the taps of the channel.

    The transforms run in float32 (float64 for float64 inputs) regardless of autocast, because there is no FFT
    in bf16. The function is once differentiable in both arguments.

    Args:
        x: Inputs (B, L, E).
        k: Taps (E, K), index = lag. Lags from L onwards have no effect; if K < L, later taps are zero.

    Returns:
        Outputs (B, L, E) in the dtype and memory layout of ``x``. Every layout works; (E, B, L) is fastest.

    Raises:
        ValueError: If the channels of ``x`` and ``k`` differ, or either is empty.
    """
    _check_shapes(x, k)
    length = x.shape[1]
    k = k[:, :length]
    match _backend(x, k, causal=True):
        case "cudnn":
            return cudnn_conv.causal_conv(x, k)
        case "windows":
            y = row_conv(x.permute(2, 0, 1), k, _windows_length(length))[0]
        case _:
            y = _circular_conv(x.permute(2, 0, 1), k, fft_length(length + k.shape[1] - 1))[0]
    return y.permute(1, 2, 0)


def toeplitz_two_sided(x: Tensor, k: Tensor) -> Tensor:
    """Convolve each channel of ``x`` bidirectionally: y[t] = sum over s of k[t-s] x[s].

    Precision, layouts and size of the transforms are those of :func:`toeplitz`: negative lags are at the end
    of the circular buffer. Inputs at padding positions must be zero.

    Args:
        x: Inputs (B, L, E).
        k: Taps (E, 2K - 1) of lags -(K-1) .. K-1 in order, with lag 0 in the middle. Lags beyond L - 1 in
            either direction have no effect; if K < L, taps beyond are zero.

    Returns:
        Outputs (B, L, E) in the dtype and the memory layout of ``x``.

    Raises:
        ValueError: If the channels of ``x`` and ``k`` differ, either is empty, or the number of taps is even.
    """
    _check_shapes(x, k)
    if k.shape[1] % 2 == 0:
        raise ValueError(f"k has {k.shape[1]} taps: expected an odd number, for lags -(K-1) .. K-1")
    side = min(x.shape[1], (k.shape[1] + 1) // 2)
    windows = _backend(x, k, causal=False) == "windows"
    n = _windows_length(x.shape[1]) if windows else fft_length(x.shape[1] + side - 1)
    centre = k.shape[1] // 2
    past, future = k[:, centre : centre + side], k[:, centre - side + 1 : centre]
    circle = torch.cat((past, k.new_zeros(len(k), n - 2 * side + 1), future), dim=1)
    y = (row_conv if windows else _circular_conv)(x.permute(2, 0, 1), circle, n)[0]
    return y.permute(1, 2, 0)


def _backend(x: Tensor, k: Tensor, causal: bool) -> str:
    """Return the backend of a product; only products with gradients have a choice.

    Others keep the rows of a batch, which may belong to different requests, apart from each other.
    """
    if torch.is_grad_enabled() and (x.requires_grad or k.requires_grad):
        return training_backend(x.device, causal)
    return "tiles"


def _windows_length(length: int) -> int:
    """Return the size of the transforms of ``row_conv``: rows are aligned to complex numbers."""
    return 2 * fft_length(length)


def _check_shapes(x: Tensor, k: Tensor) -> None:
    if x.dim() != 3 or k.dim() != 2 or x.shape[2] != k.shape[0]:
        raise ValueError(f"expected x (B, L, E) and k (E, K), got {tuple(x.shape)} and {tuple(k.shape)}")
    if x.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError("a Toeplitz product needs at least one token and one tap")


def toeplitz_direct(x: Tensor, k: Tensor) -> Tensor:
    """Return the same as :func:`toeplitz` by direct convolution, for few taps and without gradients.

    It is a depthwise convolution on (B, L, E) without a change of layout: on a CPU, in float32 and for 64
    tokens and taps, it is six times as fast as the FFT.

    Args:
        x: Inputs (B, L, E), L at least 1.
        k: Taps (E, K), K at least 1.
    """
    taps = min(x.shape[1], k.shape[1])
    return depthwise(torch.nn.functional.pad(x, (0, 0, taps - 1, 0)), k[:, :taps])


def depthwise(padded: Tensor, k: Tensor) -> Tensor:
    """Return the causal convolution of inputs (B, K - 1 + L, E) with taps k (E, K) from input K - 1 on."""
    weight = k.flip(1)[:, None, None]
    inputs = padded.transpose(1, 2).unsqueeze(2)
    return torch.nn.functional.conv2d(inputs, weight, groups=len(k)).squeeze(2).transpose(1, 2)


def fft_convolution(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as the op ``tnnlm::circular_conv``, without tiles and with standard PyTorch operators.

    Exported programs use it, because they run where the custom op is not registered.
    """
    dtype = transform_dtype(x, k)
    k_spectrum = torch.fft.rfft(k.to(dtype), n=n, norm="forward")
    x_spectrum = torch.fft.rfft(x.to(dtype), n=n)
    y = _inverse(x_spectrum * k_spectrum[:, None], n)[..., : x.shape[2]]
    return y.to(x.dtype), x_spectrum, k_spectrum


def convolve(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve x (E, B, L) and k (E, K) circularly over n points, both padded with zeros.

    It is the custom op ``tnnlm::circular_conv``, because autograd of rfft and irfft runs complex-to-complex
    transforms in the backward pass and keeps four more buffers, and because torch.compile breaks its graph at
    complex numbers. Each pass takes two transforms of the batch; the gradient of the taps is summed over
    the batch before its inverse transform. Channels are processed in tiles, so that on a CPU transform,
    product and inverse transform stay in the cache.

    Returns:
        The first L outputs, and the spectra of x and k for the backward pass.
    """
    dtype = transform_dtype(x, k)
    k_spectrum = torch.fft.rfft(k.to(dtype), n=n, norm="forward")
    x_spectrum = k_spectrum.new_empty(*x.shape[:2], n // 2 + 1)
    y = torch.empty_like(x)
    for tile, padded in _tiles(x, n, dtype):
        spectrum = torch.fft.rfft(padded, out=x_spectrum[tile])
        y[tile] = _inverse(spectrum * k_spectrum[tile, None], n)[..., : x.shape[2]]
    return y, x_spectrum, k_spectrum


def convolve_backward(
    grad: Tensor, x_spectrum: Tensor, k_spectrum: Tensor, n: int, taps: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the inputs, shaped as ``grad`` (E, B, L), and of the first ``taps`` taps."""
    x_grad = torch.empty_like(grad)
    k_sum = torch.empty_like(k_spectrum)
    for tile, padded in _tiles(grad, n, x_spectrum.real.dtype):
        spectrum = torch.fft.rfft(padded)
        torch.sum(spectrum * x_spectrum[tile].conj(), dim=1, out=k_sum[tile])
        spectrum *= k_spectrum[tile, None].conj()
        x_grad[tile] = _inverse(spectrum, n)[..., : grad.shape[2]]
    return x_grad, torch.fft.irfft(k_sum, n=n)[:, :taps].contiguous()


_circular_conv = torch.library.custom_op("tnnlm::circular_conv", mutates_args=())(convolve)
_circular_conv_backward = torch.library.custom_op("tnnlm::circular_conv_backward", mutates_args=())(
    convolve_backward
)


def _inverse(spectrum: Tensor, n: int) -> Tensor:
    """Return the inverse transform of a product with ``k_spectrum``.

    ``k_spectrum`` is divided by n already, which is cheaper because taps are fewer than inputs.
    """
    return torch.fft.irfft(spectrum, n=n, norm="forward")


@_circular_conv.register_fake
def _(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    spectrum = k.new_empty(k.shape[0], n // 2 + 1, dtype=transform_dtype(x, k).to_complex())
    return torch.empty_like(x), spectrum.new_empty(*x.shape[:2], n // 2 + 1), spectrum


@_circular_conv_backward.register_fake
def _(grad: Tensor, x_spectrum: Tensor, k_spectrum: Tensor, n: int, taps: int) -> tuple[Tensor, Tensor]:
    k_grad = k_spectrum.new_empty(k_spectrum.shape[0], taps, dtype=k_spectrum.real.dtype)
    return torch.empty_like(grad), k_grad


register_gradients(_circular_conv, _circular_conv_backward)


def tile_width(channels: int, batch: int, n: int, device_type: str) -> int:
    """Return the number of channels per tile of a convolution over n points, for inputs (E, B, L)."""
    if device_type != "cpu":
        return channels
    return min(channels, max(4, CACHE_BYTES // (8 * batch * (n // 2 + 1))))


def _tiles(x: Tensor, n: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the channels of x (E, B, L), each with its inputs as ``dtype``, zero-padded to ``n``.

    The inputs are in a buffer that the next tile overwrites.
    """
    channels, batch, length = x.shape
    width = tile_width(channels, batch, n, x.device.type)
    buffer = x.new_zeros(width, batch, n, dtype=dtype)
    for start in range(0, channels, width):
        tile = slice(start, min(start + width, channels))
        padded = buffer[: tile.stop - start]
        padded[..., :length] = x[tile]
        yield tile, padded
