"""Triton kernels of the operators in :mod:`tnnlm.ops.row_windows`, which has the same functions in PyTorch.

Only :mod:`tnnlm.ops.row_windows` imports this module, when it runs on a GPU: Triton is not a dependency. A
program computes a block of frequencies of one channel for one group of rows, and reads and writes each
element once. Complex numbers are pairs of real ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128
"""Number of frequencies per program, one for each of its 128 threads."""


@triton.jit
def row_product_kernel(
    windows: tl.tensor,
    first: tl.tensor,
    taps: tl.tensor,
    out: tl.tensor,
    B: tl.tensor,
    F: tl.tensor,
    GROUPS: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Multiply the spectra of up to ROWS rows by that of the taps."""
    program = tl.program_id(0).to(tl.int64)
    channel, group = program // GROUPS, program % GROUPS
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    sign = 1 - 2 * (f % 2)
    k_re = tl.load(taps + (channel * F + f) * 2, mask=inside, other=0.0)
    k_im = tl.load(taps + (channel * F + f) * 2 + 1, mask=inside, other=0.0)
    p_re = tl.load(first + (program * F + f) * 2, mask=inside, other=0.0)
    p_im = tl.load(first + (program * F + f) * 2 + 1, mask=inside, other=0.0)
    row = channel * B + group * ROWS
    for i in range(tl.minimum(B - group * ROWS, ROWS)):
        if i > 0:
            at = windows + ((row + i - 1) * F + f) * 2
            p_re = sign * (tl.load(at, mask=inside, other=0.0) - p_re)
            p_im = sign * (tl.load(at + 1, mask=inside, other=0.0) - p_im)
        at = out + ((row + i) * F + f) * 2
        tl.store(at, p_re * k_re - p_im * k_im, mask=inside)
        tl.store(at + 1, p_re * k_im + p_im * k_re, mask=inside)


@triton.jit
def row_product_backward_kernel(
    grad_windows: tl.tensor,
    grad_first: tl.tensor,
    windows: tl.tensor,
    first: tl.tensor,
    taps: tl.tensor,
    grad_out: tl.tensor,
    taps_out: tl.tensor,
    B: tl.tensor,
    F: tl.tensor,
    GROUPS: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Multiply the gradients of up to ROWS rows by the conjugates of the taps and, summed, of the inputs."""
    program = tl.program_id(0).to(tl.int64)
    channel, group = program // GROUPS, program % GROUPS
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    sign = 1 - 2 * (f % 2)
    k_re = tl.load(taps + (channel * F + f) * 2, mask=inside, other=0.0)
    k_im = tl.load(taps + (channel * F + f) * 2 + 1, mask=inside, other=0.0)
    start = (program * F + f) * 2
    p_re = tl.load(first + start, mask=inside, other=0.0)
    p_im = tl.load(first + start + 1, mask=inside, other=0.0)
    g_re = tl.load(grad_first + start, mask=inside, other=0.0)
    g_im = tl.load(grad_first + start + 1, mask=inside, other=0.0)
    sum_re = g_re * 0.0
    sum_im = g_im * 0.0
    row = channel * B + group * ROWS
    for i in range(tl.minimum(B - group * ROWS, ROWS)):
        if i > 0:
            at = ((row + i - 1) * F + f) * 2
            p_re = sign * (tl.load(windows + at, mask=inside, other=0.0) - p_re)
            p_im = sign * (tl.load(windows + at + 1, mask=inside, other=0.0) - p_im)
            g_re = sign * (tl.load(grad_windows + at, mask=inside, other=0.0) - g_re)
            g_im = sign * (tl.load(grad_windows + at + 1, mask=inside, other=0.0) - g_im)
        sum_re += g_re * p_re + g_im * p_im
        sum_im += g_im * p_re - g_re * p_im
        at = ((row + i) * F + f) * 2
        tl.store(grad_out + at, g_re * k_re + g_im * k_im, mask=inside)
        tl.store(grad_out + at + 1, g_im * k_re - g_re * k_im, mask=inside)
    tl.store(taps_out + start, sum_re, mask=inside)
    tl.store(taps_out + start + 1, sum_im, mask=inside)


def row_product(windows: Tensor, first: Tensor, taps: Tensor, batch: int, rows: int) -> Tensor:
    """Launch :func:`tnnlm.ops.row_windows.row_product` for groups of ``rows`` rows."""
    channels, groups, size = first.shape
    out = first.new_empty(channels, batch, size)
    grid = (channels * groups, triton.cdiv(size, _BLOCK))
    tensors = (_reals(tensor) for tensor in (windows, first, taps, out))
    row_product_kernel[grid](*tensors, batch, size, groups, ROWS=rows, BLOCK=_BLOCK)
    return out


def row_product_backward(
    grad_windows: Tensor,
    grad_first: Tensor,
    windows: Tensor,
    first: Tensor,
    taps: Tensor,
    batch: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`tnnlm.ops.row_windows.row_product_backward` for groups of ``rows`` rows."""
    channels, groups, size = first.shape
    grad_out = first.new_empty(channels, batch, size)
    taps_out = torch.empty_like(first, memory_format=torch.contiguous_format)
    inputs = (grad_windows, grad_first, windows, first, taps)
    grid = (channels * groups, triton.cdiv(size, _BLOCK))
    tensors = (_reals(tensor) for tensor in (*inputs, grad_out, taps_out))
    row_product_backward_kernel[grid](*tensors, batch, size, groups, ROWS=rows, BLOCK=_BLOCK)
    return grad_out, taps_out


def _reals(spectrum: Tensor) -> Tensor:
    """Return a contiguous complex tensor as pairs of real numbers."""
    return torch.view_as_real(spectrum.resolve_conj().contiguous())
