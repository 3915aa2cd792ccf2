"""Triton kernels of the operators in :mod:`tnnlm.ops.fused`, which has the same functions in PyTorch.

Only :mod:`tnnlm.ops.fused` imports this module, when it runs on a GPU: Triton is not a dependency. Kernels
compute in float32 and round once, when they store a result. Dimensions are those of :mod:`tnnlm.ops.ssm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 512
"""Number of elements of the state per program, four for each of its 128 threads."""
_WIDTH = 64
"""Largest number of modes or taps that a program loads at a time."""
_BLOCK = 1024
"""Number of elements per program of :func:`silu_gate`."""


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """Return x sigmoid(x) of a block in float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gated_step_kernel(
    projected: tl.tensor,
    taps: tl.tensor,
    poles: tl.tensor,
    residues: tl.tensor,
    window: tl.tensor,
    real: tl.tensor,
    imag: tl.tensor,
    active: tl.tensor,
    out: tl.tensor,
    after: tl.tensor,
    E: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Step BLOCK_E channels of one row; ``after`` is the next window, and ``out`` the gated outputs."""
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    channel = (b * E + e)[:, None]
    gate = silu(tl.load(projected + b * 2 * E + e, mask=inside, other=0.0).to(tl.float32))
    u = silu(tl.load(projected + b * 2 * E + E + e, mask=inside, other=0.0).to(tl.float32))
    # One number per channel, because Triton's interpreter doesn't broadcast a single boolean.
    runs = (tl.load(active + b + 0 * e) != 0)[:, None] if MASKED else True
    y = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N))[None, :]
        valid = inside[:, None] & (n < N)
        if SHARED:
            at, there = n, n < N
        else:
            at, there = e[:, None] * 2 * N + n, valid
        pole_re = tl.load(poles + at, mask=there, other=0.0)
        pole_im = tl.load(poles + at + N, mask=there, other=0.0)
        # The fine part of a pole is added first, as in SSMParams.step, or it would be rounded away.
        re, im = pole_re.to(tl.float32), pole_im.to(tl.float32)
        re_fine = (pole_re - re.to(tl.float64)).to(tl.float32)
        im_fine = (pole_im - im.to(tl.float64)).to(tl.float32)
        s_re = tl.load(real + channel * N + n, mask=valid, other=0.0)
        s_im = tl.load(imag + channel * N + n, mask=valid, other=0.0)
        next_re = u[:, None] + re_fine * s_re - im_fine * s_im + re * s_re - im * s_im
        next_im = re_fine * s_im + im_fine * s_re + re * s_im + im * s_re
        c = residues + e[:, None] * 2 * N + n
        c_re = tl.load(c, mask=valid, other=0.0)
        c_im = tl.load(c + N, mask=valid, other=0.0)
        y += tl.sum(next_re * c_re - next_im * c_im, 1)
        changed = valid & runs if MASKED else valid
        tl.store(real + channel * N + n, next_re, mask=changed)
        tl.store(imag + channel * N + n, next_im, mask=changed)
    for first in range(0, P, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P))[None, :]
        valid = inside[:, None] & (p < P)
        earlier = tl.load(window + channel * (P - 1) + p - 1, mask=valid & (p > 0), other=0.0)
        recent = tl.where(p == 0, u[:, None], earlier)
        y += tl.sum(recent * tl.load(taps + e[:, None] * P + p, mask=valid, other=0.0), 1)
        stored = valid & (p < P - 1)
        if MASKED:
            before = tl.load(window + channel * (P - 1) + p, mask=stored, other=0.0)
            recent = tl.where(runs, recent, before)
        tl.store(after + channel * (P - 1) + p, recent, mask=stored)
    tl.store(out + b * E + e, gate * y, mask=inside)


@triton.jit
def rms_norm_kernel(
    x: tl.tensor, out: tl.tensor, D: tl.tensor, scale: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Normalise one row; ``scale`` is 1 / sqrt(D)."""
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    values = tl.load(x + row + d, mask=d < D, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(values * values, 0))
    tl.store(out + row + d, values / (norm * scale + 1e-8), mask=d < D)


@triton.jit
def silu_gate_kernel(
    projected: tl.tensor, out: tl.tensor, size: tl.tensor, H: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Compute BLOCK of the ``size`` = rows x H outputs."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = projected + i + i // H * H
    gate = tl.load(at, mask=i < size, other=0.0).to(tl.float32)
    value = tl.load(at + H, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, silu(gate) * value, mask=i < size)


def gated_step(
    projected: Tensor,
    taps: Tensor,
    poles: Tensor,
    residues: Tensor,
    window: Tensor,
    real: Tensor,
    imag: Tensor,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the step; arguments and results are those of :func:`tnnlm.ops.fused.gated_step`."""
    rows, channels, modes = real.shape
    width = taps.shape[1]
    assert real.is_contiguous()
    assert imag.is_contiguous()
    assert real.dtype == torch.float32
    out = projected.new_empty(rows, channels)
    after = torch.empty_like(window, memory_format=torch.contiguous_format)
    block_n, block_p = (min(_WIDTH, triton.next_power_of_2(max(1, size))) for size in (modes, width))
    block_e = min(_WIDTH, _TILE // max(block_n, block_p))
    gated_step_kernel[(triton.cdiv(channels, block_e), rows)](
        projected.contiguous(),
        taps.contiguous(),
        poles.contiguous(),
        residues.contiguous(),
        window.contiguous(),
        real,
        imag,
        out if active is None else active.to(torch.uint8),
        out,
        after,
        channels,
        modes,
        width,
        SHARED=poles.dim() == 2,
        MASKED=active is not None,
        BLOCK_E=block_e,
        BLOCK_N=block_n,
        BLOCK_P=block_p,
        enable_fp_fusion=True,
    )
    return out, after


def rms_norm(x: Tensor) -> Tensor:
    """Launch the norm of :func:`tnnlm.ops.fused.rms_norm`."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(x.numel() // width,)](x, out, width, width**-0.5, BLOCK=block, enable_fp_fusion=True)
    return out


def silu_gate(projected: Tensor) -> Tensor:
    """Launch the gate of :func:`tnnlm.ops.fused.silu_gate`."""
    projected, width = projected.contiguous(), projected.shape[-1] // 2
    out = projected.new_empty(*projected.shape[:-1], width)
    grid = (triton.cdiv(out.numel(), _BLOCK),)
    silu_gate_kernel[grid](projected, out, out.numel(), width, BLOCK=_BLOCK, enable_fp_fusion=True)
    return out
