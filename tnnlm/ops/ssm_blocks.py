"""Prefill of the modes in blocks: a convolution inside each, two matrix products between them.

The state after a block is a product of powers of the poles with the block's inputs, and what it adds to the
next block's outputs is another. Letters: B batch, L length, E channels, N modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.machine.capabilities import switched_off
from tnnlm.ops.powers import mode_taps, pole_powers
from tnnlm.ops.toeplitz import toeplitz, toeplitz_direct

_DIRECT_TAPS = 128
"""up to so many a direct convolution is faster than an FFT"""
_SMALL_BLOCK, _FFT_BLOCK = 64, 512
"""tokens of a block at least, and with an FFT inside it"""


def prefill_modes(
    poles: Tensor, residues: Tensor, u: Tensor, real: Tensor, imag: Tensor, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the modes add to the outputs (B, L, E), and their state as planes (B, E, N).

    Args:
        poles: planes (2, N), or (E, 2, N), in float64.
        residues: planes (E, 2, N).
        u: inputs (B, L, E).
        real: Re s before the first of them, (B, E, N).
        imag: Im s.
        last: (B,) tokens of each row, after which the state is returned; None means L each.
    """
    length = u.shape[1]
    block = min(length, _block_length(u, residues.shape[2]))
    powers = pole_powers(poles, block + 1)
    # The sum over the modes in float64: ETSC's terms are hundreds of times the taps they leave.
    k = mode_taps(residues.double(), powers[..., :block]).to(u.dtype)
    whole = torch.nn.functional.pad(u, (0, 0, 0, -length % block)) if length % block else u
    y = convolve(whole.reshape(-1, block, u.shape[2]), k).reshape(whole.shape)[:, :length]
    # Modes before channels, real parts over imaginary ones: with shared poles both products of a block are
    # of row-major matrices then, which BLAS is up to seven times faster at for a handful of modes.
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
    """``k`` applied to (B, L, E): directly where taps are few and the library is fast at it."""
    few = min(k.shape[1], u.shape[1]) <= _DIRECT_TAPS
    fast = u.device.type == "cpu" and u.dtype == torch.float32 and few and not torch.is_grad_enabled()
    return toeplitz_direct(u, k) if fast and _has_onednn() else toeplitz(u, k)


def _has_onednn() -> bool:
    """Whether the library may be used. It isn't probed, which a program that is being exported couldn't be:
    PyTorch itself goes another way where the library can't do it."""
    return torch.backends.mkldnn.is_available() and "onednn_float32" not in switched_off()


def _block_length(u: Tensor, modes: int) -> int:
    """Tokens between which the state is carried on. Inside a block a convolution costs in proportion to its
    length, or by FFT next to nothing more; between blocks every mode costs."""
    if u.device.type != "cpu" or modes > _DIRECT_TAPS:
        return _FFT_BLOCK
    return max(_SMALL_BLOCK, 1 << (modes - 1).bit_length())


def _add_free_response(y: Tensor, c: Tensor, powers: Tensor, s: Tensor) -> None:
    """Add to y (B, L, E) what the state (B, 2, N, E) alone contributes: Re sum_m c[m] lam[m]^(j+1) s_m."""
    w = _times(c, s)
    w[:, 1].neg_()
    later = powers[..., 1 : y.shape[1] + 1]
    if powers.dim() == 3:
        y.baddbmm_(later.flatten(0, 1).T.expand(y.shape[0], -1, -1), w.flatten(1, 2))
    else:
        y += torch.einsum("bcne,cnel->ble", w, later)


def _advance_modes(powers: Tensor, u: Tensor, s: Tensor, last: Tensor) -> Tensor:
    """The state after ``last[b]`` tokens, lam^last s + sum_{j<last} lam^(last-1-j) u[j], for right-aligned
    u (B, L, E)."""
    after = _times(powers[..., last].movedim(-1, 0).reshape(u.shape[0], *powers.shape[:2], -1), s)
    reverse = powers[..., : u.shape[1]].flip(-1)
    if powers.dim() == 3:
        after.flatten(1, 2).baddbmm_(reverse.flatten(0, 1).expand(u.shape[0], -1, -1), u)
    else:
        after += torch.einsum("ble,cnel->bcne", u, reverse)
    return after


def _times(a: Tensor, s: Tensor) -> Tensor:
    """The product of complex numbers as planes: a ([B,] 2, N, E or 1) and s (B, 2, N, E)."""
    (a_re, a_im), (s_re, s_im) = a.unbind(-3), s.unbind(1)
    product = torch.empty_like(s)
    torch.mul(a_re, s_re, out=product[:, 0]).addcmul_(a_im, s_im, value=-1)
    torch.mul(a_re, s_im, out=product[:, 1]).addcmul_(a_im, s_re)
    return product


def _align_right(u: Tensor, last: Tensor) -> Tensor:
    """Shift every row's ``last[b]`` tokens to the right end of (B, L, E), zeros in front: one table of
    powers serves all rows then."""
    source = torch.arange(u.shape[1], device=u.device) - (u.shape[1] - last[:, None])
    index = source.clamp(min=0)[:, :, None].expand_as(u)
    return u.gather(1, index) * (source >= 0)[:, :, None]
