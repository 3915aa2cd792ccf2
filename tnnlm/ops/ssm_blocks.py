"""Prefill of modes in blocks: a convolution within each block, and matrix products between blocks.

The tokens of a span of G blocks are processed at once. A product of powers of the poles with the inputs gives
what each block adds to the state; a product for each mode, with powers of lam^T, gives the states between the
blocks; a third gives the contribution of those states to the outputs. Dimensions: B batch, L length,
E channels, N modes, T tokens per block, G blocks per span.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tnnlm.machine.capabilities import switched_off
from tnnlm.ops.powers import mode_taps, pole_powers
from tnnlm.ops.toeplitz import depthwise, toeplitz, toeplitz_direct

_DIRECT_TAPS = 128
"""Number of taps up to which a direct convolution is faster than an FFT."""
_SMALL_BLOCK, _FFT_BLOCK = 64, 512
"""Minimum tokens per block, and tokens per block with an FFT within it."""


class _Tables(NamedTuple):
    """Functions of the parameters that every span needs."""

    taps: Tensor
    """First T taps (E, T)."""
    powers: Tensor
    """Powers lam^0 .. lam^T as planes, (2, N, T + 1), or (2, N, E, T + 1)."""
    later: Tensor
    """Powers lam^1 .. lam^T, with negative imaginary parts, so that products sum to real parts."""
    residues: Tensor
    """Residues with channels last, (2, N, E)."""
    between: Tensor | None
    """Map from the state before a span and what its blocks add, to the states after 0 .. G blocks,
    (N, 2 (G + 1), 2 (G + 1)); None if G is 1."""

    @property
    def blocks(self) -> int:
        """Number of blocks per span, G."""
        return 1 if self.between is None else self.between.shape[1] // 2 - 1

    def for_tokens(self, length: int) -> _Tables:
        """Return the tables for inputs of ``length`` tokens, which may be less than a block."""
        if length >= self.taps.shape[1]:
            return self
        powers, later = self.powers[..., : length + 1], self.later[..., :length]
        return _Tables(self.taps[:, :length], powers, later, self.residues, None)


def prefill_modes(
    poles: Tensor, residues: Tensor, u: Tensor, real: Tensor, imag: Tensor, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the outputs and the next state of the modes.

    Args:
        poles: Planes (2, N), or (E, 2, N), in float64.
        residues: Planes (E, 2, N).
        u: Inputs (B, L, E), in any dtype.
        real: Re s before the first input, (B, E, N).
        imag: Im s before the first input, (B, E, N).
        last: Number of tokens of each row, (B,), after which the state is returned; None means L each.

    Returns:
        Contribution of the modes to the outputs (B, L, E), in the dtype of the state, and Re s and Im s after
        the last token, (B, E, N).
    """
    length = u.shape[1]
    block = _block_length(u.device, residues.shape[2])
    tables = _tables(poles, residues, block, real.dtype).for_tokens(length)
    span = tables.taps.shape[1] * tables.blocks
    # Modes precede channels, and real parts precede imaginary parts: all products have row-major operands,
    # for which BLAS is up to seven times faster with few modes.
    s = torch.stack((real, imag)).permute(0, 3, 1, 2)
    outputs = []
    for start in range(0, length, span):
        part = u[:, start : start + span]
        y, s = _span(tables, part, s, None if last is None else (last - start).clamp(0, part.shape[1]))
        outputs.append(y)
    real, imag = (plane.permute(1, 2, 0).contiguous() for plane in s)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), real, imag


def convolve(u: Tensor, k: Tensor) -> Tensor:
    """Convolve u (B, L, E) with taps k (E, K), directly if there are few taps and oneDNN is available."""
    direct = _is_direct(u.device, u.dtype, min(k.shape[1], u.shape[1]))
    return toeplitz_direct(u, k) if direct else toeplitz(u, k)


def _is_direct(device: torch.device, dtype: torch.dtype, taps: int) -> bool:
    """Return whether a direct convolution is possible, and the fastest one."""
    fast = device.type == "cpu" and dtype == torch.float32 and taps <= _DIRECT_TAPS
    return fast and not torch.is_grad_enabled() and _has_onednn()


def _has_onednn() -> bool:
    """Return whether oneDNN may be used.

    It isn't probed, because tracing for export can't run a probe; PyTorch falls back to another
    implementation if oneDNN doesn't support the operation.
    """
    return torch.backends.mkldnn.is_available() and "onednn_float32" not in switched_off()


def _block_length(device: torch.device, modes: int) -> int:
    """Return the number of tokens per block.

    The cost per token of a direct convolution within a block grows with the block length, that of an FFT
    hardly does; the cost of carrying the state between blocks grows with the number of modes.
    """
    if device.type != "cpu" or modes > _DIRECT_TAPS:
        return _FFT_BLOCK
    return max(_SMALL_BLOCK, 1 << (modes - 1).bit_length())


_KEPT: Any = WeakIdKeyDictionary()
"""Tables by the tensor of residues, and by block, dtype and versions of the parameters."""


def _tables(poles: Tensor, residues: Tensor, block: int, dtype: torch.dtype) -> _Tables:
    """Return the tables for blocks of T tokens, kept from an earlier call if the parameters are the same.

    Tables of poles per channel are as large as hundreds of states, and not kept.
    """
    if poles.dim() == 3 or not (_may_keep(poles) and _may_keep(residues)):
        return _make_tables(poles, residues, block, dtype)
    kept = _KEPT.setdefault(residues, {})
    key = (block, dtype)
    made_for = (poles, poles._version, residues._version)
    found = kept.get(key)
    if found is None or found[0][0] is not poles or found[0][1:] != made_for[1:]:
        found = kept[key] = made_for, _make_tables(poles, residues, block, dtype)
    tables: _Tables = found[1]
    return tables


def _may_keep(parameter: Tensor) -> bool:
    """Return whether a change of a tensor can be noticed, and its functions are plain tensors."""
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return (
        plain and not parameter.is_inference() and not (parameter.requires_grad and torch.is_grad_enabled())
    )


def _make_tables(poles: Tensor, residues: Tensor, block: int, dtype: torch.dtype) -> _Tables:
    powers = pole_powers(poles, block + 1)
    # Summed in float64: the terms of ETSC are hundreds of times larger than the taps that they sum to.
    k = mode_taps(residues.double(), powers[..., :block]).to(dtype)
    span = max(1, _FFT_BLOCK // block)
    between = None
    if poles.dim() == 2 and span > 1:
        between = _between(pole_powers(powers[..., block], span + 1)).to(dtype)
    powers = powers if powers.dim() == 3 else powers.permute(1, 2, 0, 3)
    powers = powers.to(dtype)
    later = torch.stack((powers[0], -powers[1]))[..., 1:]
    return _Tables(k, powers, later, residues.to(dtype).permute(1, 2, 0).contiguous(), between)


def _between(powers: Tensor) -> Tensor:
    """Return the lower triangular Toeplitz matrix of complex powers (2, N, G + 1) in real arithmetic."""
    count = powers.shape[-1]
    lag = torch.arange(count, device=powers.device)[:, None] - torch.arange(count, device=powers.device)
    re, im = (powers[..., lag.clamp(min=0)] * (lag >= 0)).unbind(0)
    rows = torch.stack((torch.stack((re, -im), dim=-1), torch.stack((im, re), dim=-1)), dim=2)
    return rows.flatten(3).flatten(1, 2)


def _span(tables: _Tables, u: Tensor, s: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """Process the tokens u (B, L, E) of at most G blocks from the state s (2, N, B, E).

    Returns:
        Outputs (B, L, E) in the dtype of the state, and the state after ``last[b]`` tokens of each row.
    """
    block, length = tables.taps.shape[1], u.shape[1]
    direct = _is_direct(u.device, s.dtype, block)
    padded, blocks = _blocks(u, block, s.dtype, block - 1 if direct else 0)
    count, whole = blocks.shape[1], length // block
    states = _states(tables, s, blocks[:, :whole])
    rows = padded.flatten(0, 1)
    y = depthwise(rows, tables.taps) if direct else toeplitz(rows, tables.taps)
    _add_free_response(y, tables, states[:count])
    y = y.unflatten(0, (-1, count)).flatten(1, 2)[:, :length]
    if last is None:
        after, rest = states[whole], blocks[:, -1, : length % block]
        return y, _advance(tables.powers, rest, after, rest.shape[1]) if rest.shape[1] else after
    done, batch = last // block, torch.arange(u.shape[0], device=u.device)
    after = states[done, :, :, batch].permute(1, 2, 0, 3)
    partial = last - done * block
    right = _align_right(u, done * block, partial, block).to(s.dtype)
    return y, _advance(tables.powers, right, after, partial)


def _blocks(u: Tensor, block: int, dtype: torch.dtype, front: int) -> tuple[Tensor, Tensor]:
    """Return the tokens u (B, L, E) as blocks of T, (B, G, T, E), the last of which ends in zeros.

    They are the end of a tensor (B, G, ``front`` + T, E), also returned, in which zeros precede each block,
    so that inputs are copied once to convert and to pad them.
    """
    batch, length, channels = u.shape
    whole, rest = divmod(length, block)
    if not (front or rest or u.dtype != dtype):
        blocks = u.unflatten(1, (whole, block))
        return blocks, blocks
    padded = u.new_empty(batch, -(-length // block), front + block, channels, dtype=dtype)
    padded[:, :, :front] = 0
    blocks = padded[:, :, front:]
    blocks[:, :whole] = u[:, : whole * block].unflatten(1, (whole, block))
    if rest:
        blocks[:, whole, :rest] = u[:, whole * block :]
        blocks[:, whole, rest:] = 0
    return padded, blocks


def _states(tables: _Tables, s: Tensor, blocks: Tensor) -> Tensor:
    """Return the states after 0, 1, .. of the complete blocks (B, G, T, E), (G + 1, 2, N, B, E)."""
    if not blocks.shape[1]:
        return s[None]
    added = _added(tables.powers, blocks)
    if tables.between is None:
        return torch.stack((s, _times(_power(tables.powers, blocks.shape[2]), s) + added[0]))
    rows = 2 * (blocks.shape[1] + 1)
    given = torch.cat((s[None], added)).flatten(3).flatten(0, 1).transpose(0, 1)
    states = torch.bmm(tables.between[:, :rows, :rows], given)
    return states.unflatten(1, (-1, 2)).unflatten(3, s.shape[2:]).permute(1, 2, 0, 3, 4)


def _added(powers: Tensor, blocks: Tensor) -> Tensor:
    """Return what blocks (B, G, T, E) add to the state, sum_{j<T} lam^(T-1-j) u[j], (G, 2, N, B, E)."""
    batch, count, length, channels = blocks.shape
    reverse = powers[..., :length].flip(-1)
    if powers.dim() == 4:
        return torch.einsum("bgle,cnel->gcnbe", blocks, reverse)
    product = torch.bmm(reverse.flatten(0, 1).expand(batch * count, -1, -1), blocks.flatten(0, 1))
    return product.view(batch, count, 2, -1, channels).permute(1, 2, 3, 0, 4)


def _add_free_response(y: Tensor, tables: _Tables, states: Tensor) -> None:
    """Add what the states before each block contribute, Re sum_m c[m] lam[m]^(j+1) s_m, to y (B G, T, E)."""
    w, later = _times(tables.residues[:, :, None], states), tables.later
    if later.dim() == 3:
        rows = w.permute(3, 0, 1, 2, 4).flatten(2, 3).flatten(0, 1)
        y.baddbmm_(later.flatten(0, 1).T.expand(y.shape[0], -1, -1), rows)
    else:
        y += torch.einsum("gcnbe,cnel->bgle", w, later).flatten(0, 1)


def _advance(powers: Tensor, u: Tensor, s: Tensor, last: int | Tensor) -> Tensor:
    """Return the state (2, N, B, E) after ``last`` tokens of u (B, L, E), which are right-aligned."""
    return _times(_power(powers, last), s) + _added(powers, u[:, None])[0]


def _power(powers: Tensor, exponent: int | Tensor) -> Tensor:
    """Return lam^exponent, for each row if given as (B,), as factors of a state (2, N, B, E)."""
    chosen = powers[..., exponent]
    if isinstance(exponent, int):
        chosen = chosen.unsqueeze(-1)
    return chosen.unsqueeze(-1) if powers.dim() == 3 else chosen.transpose(-1, -2)


def _times(a: Tensor, s: Tensor) -> Tensor:
    """Return the product of complex numbers as planes, a (2, N, B or 1, E or 1) and s ([G,] 2, N, B, E)."""
    (a_re, a_im), (s_re, s_im) = a.unbind(0), s.unbind(-4)
    product = s.new_empty(s.shape)
    torch.mul(a_re, s_re, out=product.select(-4, 0)).addcmul_(a_im, s_im, value=-1)
    torch.mul(a_re, s_im, out=product.select(-4, 1)).addcmul_(a_im, s_re)
    return product


def _align_right(u: Tensor, first: Tensor, counts: Tensor, length: int) -> Tensor:
    """Return ``counts[b]`` tokens of u (B, L, E) from ``first[b]`` on, zeros in front, (B, ``length``, E).

    Aligned at their ends, all rows need the same table of powers.
    """
    source = torch.arange(length, device=u.device) - (length - counts[:, None])
    index = (first[:, None] + source).clamp(0, u.shape[1] - 1)[:, :, None].expand(-1, -1, u.shape[2])
    return u.gather(1, index) * (source >= 0)[:, :, None]
