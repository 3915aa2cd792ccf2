"""Circular convolution with few passes over memory, for training on a GPU, where memory limits FFTs.

A transform of n = 2 H points of rows of H tokens usually reads a copy that is padded with zeros. Here it
reads windows of two neighbouring rows of the batch, [x_b, x_(b+1)], which are views of the input. With P_b
for the spectrum of the padded row [x_b, 0], that of a window is W_b = P_b + (-1)^f P_(b+1) at frequency f.
Hence every P_b follows from that of the row before, and only the first row of :data:`ROWS` is padded. The
product with the spectrum of the taps computes P_b on the way: it is one Triton kernel of
:mod:`tnnlm.ops.triton_windows`, or the function of this module, which is its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.ops.circular import register_gradients, transform_dtype

ROWS = 32
"""Number of rows whose spectra follow from each other; it limits how far rounding errors spread."""


@torch.library.custom_op("tnnlm::row_product", mutates_args=())
def row_product(windows: Tensor, first: Tensor, taps: Tensor, batch: int) -> Tensor:
    """Return the products of the spectra of all rows with that of the taps.

    Args:
        windows: Spectra of the windows (E B - 1, F), which start at consecutive rows of consecutive channels;
            empty if the batch has one row.
        first: Spectra of every :data:`ROWS`-th row, padded, (E, ceil(B / ROWS), F).
        taps: Spectrum of the taps (E, F).
        batch: Number of rows, B.

    Returns:
        Spectra (E, B, F).
    """
    return row_spectra(windows, first, batch) * taps[:, None]


@torch.library.custom_op("tnnlm::row_product_backward", mutates_args=())
def row_product_backward(
    grad_windows: Tensor, grad_first: Tensor, windows: Tensor, first: Tensor, taps: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """Return the spectra of the gradients, from those of the gradient of the outputs.

    Args:
        grad_windows: Spectra of the windows of the gradient of the outputs (E B - 1, F).
        grad_first: Spectra of its padded rows (E, ceil(B / ROWS), F).
        windows: Argument of :func:`row_product`.
        first: Argument of :func:`row_product`.
        taps: Argument of :func:`row_product`.
        batch: Argument of :func:`row_product`.

    Returns:
        Spectra of the gradients of the rows (E, B, F), and of the taps, each summed over :data:`ROWS` rows
        (E, ceil(B / ROWS), F).
    """
    grads = row_spectra(grad_windows, grad_first, batch)
    products = grads * row_spectra(windows, first, batch).conj()
    sums = [part.sum(dim=1) for part in products.split(ROWS, dim=1)]
    return grads * taps[:, None].conj(), torch.stack(sums, dim=1)


def row_spectra(windows: Tensor, first: Tensor, batch: int) -> Tensor:
    """Return the spectra (E, B, F) of the padded rows; arguments are those of :func:`row_product`."""
    spectra = first.new_empty(first.shape[0], batch, first.shape[2])
    spectra[:, ::ROWS] = first
    sign = 1 - 2 * (torch.arange(first.shape[2], device=first.device) % 2)
    for row in range(1, batch):
        if row % ROWS:
            spectra[:, row] = sign * (windows[row - 1 :: batch] - spectra[:, row - 1])
    return spectra


@row_product.register_kernel("cuda")
def _row_product_on_gpu(windows: Tensor, first: Tensor, taps: Tensor, batch: int) -> Tensor:
    from tnnlm.ops import triton_windows

    return triton_windows.row_product(windows, first, taps, batch, ROWS)


@row_product_backward.register_kernel("cuda")
def _row_product_backward_on_gpu(
    grad_windows: Tensor, grad_first: Tensor, windows: Tensor, first: Tensor, taps: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    from tnnlm.ops import triton_windows

    return triton_windows.row_product_backward(grad_windows, grad_first, windows, first, taps, batch, ROWS)


def convolve(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolve x (E, B, L) and k (E, K) circularly over n points, n / 2 >= L; the op is ``tnnlm::row_conv``.

    Returns:
        The first L outputs in the dtype and layout of x, and for the backward pass the spectra of the
        windows, of the first rows and of the taps.
    """
    dtype = transform_dtype(x, k)
    taps = torch.fft.rfft(k.to(dtype), n=n, norm="forward")
    windows, first = _transform(x, n, dtype)
    # The taps are divided by n already, which is cheaper because they are fewer than the inputs.
    y = torch.fft.irfft(row_product(windows, first, taps, x.shape[1]), n=n, norm="forward")
    return torch.empty_like(x).copy_(y[..., : x.shape[2]]), windows, first, taps


def convolve_backward(
    grad: Tensor, windows: Tensor, first: Tensor, taps: Tensor, n: int, n_taps: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the inputs (E, B, L) and of the first ``n_taps`` taps.

    The first is a view of the inverse transform where the dtypes agree, which saves a copy.
    """
    grad_windows, grad_first = _transform(grad, n, first.real.dtype)
    x_spectra, k_spectra = row_product_backward(grad_windows, grad_first, windows, first, taps, grad.shape[1])
    x_grad = torch.fft.irfft(x_spectra, n=n, norm="forward")[..., : grad.shape[2]]
    k_spectrum = k_spectra[:, 0] if k_spectra.shape[1] == 1 else k_spectra.sum(dim=1)
    return x_grad.to(grad.dtype), torch.fft.irfft(k_spectrum, n=n)[:, :n_taps].contiguous()


row_conv = torch.library.custom_op("tnnlm::row_conv", mutates_args=())(convolve)
row_conv_backward = torch.library.custom_op("tnnlm::row_conv_backward", mutates_args=())(convolve_backward)


def _transform(x: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the arguments ``windows`` and ``first`` of :func:`row_product` for x (E, B, L).

    Rows are copied only to change the dtype or layout, or to pad them to n / 2.
    """
    channels, batch, length = x.shape
    rows = x
    if x.dtype != dtype or length < n // 2 or not x.is_contiguous():
        rows = x.new_empty(channels, batch, n // 2, dtype=dtype)
        rows[..., :length] = x
        rows[..., length:] = 0
    first = torch.fft.rfft(rows[:, ::ROWS], n=n)
    if batch == 1:
        return first.new_empty(0, n // 2 + 1), first
    return torch.fft.rfft(rows.view(-1).unfold(0, n, n // 2)), first


@row_product.register_fake
def _(windows: Tensor, first: Tensor, taps: Tensor, batch: int) -> Tensor:
    return first.new_empty(first.shape[0], batch, first.shape[2])


@row_product_backward.register_fake
def _(
    grad_windows: Tensor, grad_first: Tensor, windows: Tensor, first: Tensor, taps: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape[0], batch, first.shape[2]), torch.empty_like(first)


@row_conv.register_fake
def _(x: Tensor, k: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, batch, _ = x.shape
    dtype = transform_dtype(x, k)
    taps = k.new_empty(channels, n // 2 + 1, dtype=dtype.to_complex())
    first = taps.new_empty(channels, (batch + ROWS - 1) // ROWS, n // 2 + 1)
    windows = taps.new_empty(channels * batch - 1 if batch > 1 else 0, n // 2 + 1)
    return torch.empty_like(x), windows, first, taps


@row_conv_backward.register_fake
def _(
    grad: Tensor, windows: Tensor, first: Tensor, taps: Tensor, n: int, n_taps: int
) -> tuple[Tensor, Tensor]:
    dtype = first.real.dtype
    x_grad = grad.new_empty(*grad.shape[:2], n, dtype=dtype)[..., : grad.shape[2]].to(grad.dtype)
    return x_grad, taps.new_empty(taps.shape[0], n_taps, dtype=dtype)


register_gradients(row_conv, row_conv_backward)
