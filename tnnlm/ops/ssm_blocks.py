"""Prefill of modes in blocks: a convolution within each block, two matrix products between blocks.

One product, of powers of the poles with the inputs of a block, gives the state after the block; the other
gives the contribution of that state to the outputs of the next block. Dimensions: B batch, L length,
E channels, N modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.machine.capabilities import switched_off
from tnnlm.ops.powers import mode_taps, pole_powers
from tnnlm.ops.toeplitz import toeplitz, toeplitz_direct

_DIRECT_TAPS = 128
"""Number of taps up to which a direct convolution is faster than an FFT."""
_SMALL_BLOCK, _FFT_BLOCK = 64, 512
"""Minimum tokens per block, and tokens per block with an FFT within it."""


def prefill_modes(
    poles: Tensor, residues: Tensor, u: Tensor, real: Tensor, imag: Tensor, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the outputs and the next state of the modes.

    Args:
        poles: Planes (2, N), or (E, 2, N), in float64.
        residues: Planes (E, 2, N).
        u: Inputs (B, L, E).
        real: Re s before the first input, (B, E, N).
        imag: Im s before the first input, (B, E, N).
        last: Number of tokens of each row, (B,), after which the state is returned; None means L each.

    Returns:
        Contribution of the modes to the outputs (B, L, E), and Re s and Im s after the last token, (B, E, N).
    """
    length = u.shape[1]
    block = min(length, _block_length(u, residues.shape[2]))
    powers = pole_powers(poles, block + 1)
    # Summed in float64: the terms of ETSC are hundreds of times larger than the taps that they sum to.
    k = mode_taps(residues.double(), powers[..., :block]).to(u.dtype)
    whole = torch.nn.functional.pad(u, (0, 0, 0, -length % block)) if length % block else u
    y = convolve(whole.reshape(-1, block, u.shape[2]), k).reshape(whole.shape)[:, :length]
    # Modes precede channels, and real parts precede imaginary parts. With shared poles both products of a
    # block then have row-major operands, for which BLAS is up to seven times faster with few modes.
    s = torch.stack((real, imag), dim=1).transpose(2, 3).contiguous()
    c = residues.permute(1, 2, 0).contiguous()
    powers = powers.to(u.dtype)
    powers = powers if powers.dim() == 3 else powers.permute(1, 2, 0, 3)
    for start in range(0, length, block):
        part = u[:, start : start + block]
        _add_free_response(y[:, start : start + block], c, powers, s)
        if last is None:
            taken = torch.full((u.shape[0],), part.shape[1], device=u.device)
        else:
            taken = (last - start).clamp(0, part.shape[1])
            part = _align_right(part, taken)
        s = _advance_modes(powers, part, s, taken)
    real, imag = (plane.transpose(1, 2).contiguous() for plane in s.unbind(1))
    return y, real, imag


def convolve(u: Tensor, k: Tensor) -> Tensor:
    """Convolve u (B, L, E) with taps k (E, K), directly if there are few taps and oneDNN is available."""
    few = min(k.shape[1], u.shape[1]) <= _DIRECT_TAPS
    fast = u.device.type == "cpu" and u.dtype == torch.float32 and few and not torch.is_grad_enabled()
    return toeplitz_direct(u, k) if fast and _has_onednn() else toeplitz(u, k)


def _has_onednn() -> bool:
    """Return whether oneDNN may be used.

    It isn't probed, because tracing for export can't run a probe; PyTorch falls back to another
    implementation if oneDNN doesn't support the operation.
    """
    return torch.backends.mkldnn.is_available() and "onednn_float32" not in switched_off()


def _block_length(u: Tensor, modes: int) -> int:
    """Return the number of tokens per block.

    The cost per token of a direct convolution within a block grows with the block length, that of an FFT
    hardly does; the cost of carrying the state between blocks grows with the number of modes.
    """
    if u.device.type != "cpu" or modes > _DIRECT_TAPS:
        return _FFT_BLOCK
    return max(_SMALL_BLOCK, 1 << (modes - 1).bit_length())


def _add_free_response(y: Tensor, c: Tensor, powers: Tensor, s: Tensor) -> None:
    """Add the contribution of the state (B, 2, N, E) to y (B, L, E): Re sum_m c[m] lam[m]^(j+1) s_m."""
    w = _times(c, s)
    w[:, 1].neg_()
    later = powers[..., 1 : y.shape[1] + 1]
    if powers.dim() == 3:
        y.baddbmm_(later.flatten(0, 1).T.expand(y.shape[0], -1, -1), w.flatten(1, 2))
    else:
        y += torch.einsum("bcne,cnel->ble", w, later)


def _advance_modes(powers: Tensor, u: Tensor, s: Tensor, last: Tensor) -> Tensor:
    """Return the state after ``last[b]`` tokens, lam^last s + sum_{j<last} lam^(last-1-j) u[j].

    The tokens of u (B, L, E) are right-aligned.
    """
    after = _times(powers[..., last].movedim(-1, 0).reshape(u.shape[0], *powers.shape[:2], -1), s)
    reverse = powers[..., : u.shape[1]].flip(-1)
    if powers.dim() == 3:
        after.flatten(1, 2).baddbmm_(reverse.flatten(0, 1).expand(u.shape[0], -1, -1), u)
    else:
        after += torch.einsum("ble,cnel->bcne", u, reverse)
    return after


def _times(a: Tensor, s: Tensor) -> Tensor:
    """Return the product of complex numbers as planes, a ([B,] 2, N, E or 1) and s (B, 2, N, E)."""
    (a_re, a_im), (s_re, s_im) = a.unbind(-3), s.unbind(1)
    product = torch.empty_like(s)
    torch.mul(a_re, s_re, out=product[:, 0]).addcmul_(a_im, s_im, value=-1)
    torch.mul(a_re, s_im, out=product[:, 1]).addcmul_(a_im, s_re)
    return product


def _align_right(u: Tensor, last: Tensor) -> Tensor:
    """Shift the ``last[b]`` tokens of each row to the right end of (B, L, E), with zeros in front.

    One table of powers then serves all rows.
    """
    source = torch.arange(u.shape[1], device=u.device) - (u.shape[1] - last[:, None])
    index = source.clamp(min=0)[:, :, None].expand_as(u)
    return u.gather(1, index) * (source >= 0)[:, :, None]
