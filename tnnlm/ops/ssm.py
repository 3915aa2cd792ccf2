"""The recurrent form of one convolution: parameters, state, one step, parallel prefill.

    s[t] = lam * s[t-1] + x[t]                                one state per channel and mode
    y[t] = sum_{p<P} h[p] x[t-p] + Re sum_m c[m] s_m[t]       effective taps h[i] + Re sum c lam^i

Complex numbers are stored as planes (re, im) of real tensors, so that casts can't drop the
imaginary part and the step compiles. Letters: B batch, L length, E channels, N modes, P window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tnnlm.ops.toeplitz import toeplitz, toeplitz_direct
from tnnlm.precision import working_dtype

_POWERS_BYTES = 1 << 25
"""of powers of the poles that ``taps`` holds at a time"""
_DIRECT_TAPS = 128
"""up to so many a direct convolution is faster than an FFT"""
_SMALL_BLOCK, _FFT_BLOCK = 64, 512
"""tokens of a block of ``prefill`` at least, and with an FFT inside it"""


class SSMParams(NamedTuple):
    """Parameters of one recurrent convolution. A conjugate pair is stored once, ``residues`` doubled.

    Poles are float64 always: they are few, and prefill raises them to high powers. The step
    rounds them to the state's dtype.
    """

    window: Tensor
    """taps of the most recent inputs, (E, P), index = lag; P may be 0"""
    poles: Tensor
    """lam as planes: (2, N), shared by all channels, or (E, 2, N); N may be 0"""
    residues: Tensor
    """c as planes: (E, 2, N)"""


class SSMState(NamedTuple):
    """What is carried between tokens: fixed size, passed in and returned, never changed in place."""

    window: Tensor
    """the last P - 1 inputs, newest first as the taps are, (B, E, max(P - 1, 0))"""
    real: Tensor
    """Re s, (B, E, N)"""
    imag: Tensor
    """Im s, (B, E, N); a tensor of its own, so that no step has to copy the two into one"""


def init_state(params: SSMParams, batch_size: int) -> SSMState:
    """The state before the first token: zeros, in the residues' dtype and on their device."""
    channels, _, modes = params.residues.shape
    inputs = max(params.window.shape[1] - 1, 0)
    new = params.residues.new_zeros
    planes = (new(batch_size, channels, modes) for _ in range(2))
    return SSMState(new(batch_size, channels, inputs), *planes)


def multiply_adds(params: SSMParams) -> int:
    """Multiply-adds of one step: six per channel and complex mode, one per window tap."""
    channels, _, modes = params.residues.shape
    return channels * (6 * modes + params.window.shape[1])


def largest_pole(params: SSMParams) -> float:
    """Largest modulus of a pole; 0 where there is none."""
    return float(torch.linalg.vector_norm(params.poles, dim=-2).max()) if params.poles.numel() else 0.0


def order(params: SSMParams) -> int:
    """Real state numbers per channel: a conjugate pair counts two, a real pole or a window tap one."""
    numbers = 1 + (params.poles[..., 1, :] != 0).int()
    if numbers.dim() == 2:
        # Of the channel that has most: modes that only fill up have neither pole nor residue.
        used = (params.poles != 0).any(-2) | (params.residues != 0).any(-2)
        return params.window.shape[1] + int((numbers * used).sum(1).amax())
    return params.window.shape[1] + int(numbers.sum())


def step(
    params: SSMParams, x: Tensor, state: SSMState, active: Tensor | None = None
) -> tuple[Tensor, SSMState]:
    """Advance by one token.

    Args:
        params: the recurrence.
        x: inputs (B, E).
        state: the state before this token.
        active: (B,) booleans; a row where it is False keeps its state (a pad step is an identity).

    Returns:
        outputs (B, E) in the dtype of ``x``, and the state after this token.
    """
    u = x.to(state.real.dtype)
    y, real, imag = _step_modes(params, u, state.real, state.imag)
    window = state.window
    if params.window.shape[1]:
        recent = torch.cat((u.unsqueeze(-1), window), dim=-1)
        y = y + torch.einsum("bep,ep->be", recent, params.window)
        window = recent[..., :-1]
    if active is not None:
        row = active[:, None, None]
        window, real, imag = (
            torch.where(row, new, old) for new, old in zip((window, real, imag), state, strict=True)
        )
    return y.to(x.dtype), SSMState(window, real, imag)


def prefill(
    params: SSMParams, x: Tensor, state: SSMState, lengths: Tensor | None = None
) -> tuple[Tensor, SSMState]:
    """Advance by L tokens in a few blocks: a convolution inside each, two matrix products between them.

    Any split of a sequence into calls gives the same outputs and state up to rounding. Memory
    grows with L: cut long prompts into chunks.

    Args:
        params: the recurrence.
        x: inputs (B, L, E).
        state: the state before the first of them; it may be warm.
        lengths: (B,) integers: row b holds ``lengths[b]`` tokens and then pads, which leave
            its state as it is. Outputs at pads mean nothing.

    Returns:
        outputs (B, L, E) in the dtype of ``x``, and the state after each row's last token.
    """
    dtype = state.real.dtype
    u = x.to(dtype)
    length = x.shape[1]
    last = torch.full((x.shape[0],), length, device=x.device) if lengths is None else lengths.to(x.device)
    y, (window, real, imag) = torch.zeros_like(u), state
    if params.residues.shape[2]:
        y, real, imag = _prefill_modes(params, u, real, imag, None if lengths is None else last)
    if params.window.shape[1]:
        history = torch.cat((window.flip(-1).transpose(1, 2), u), dim=1)
        y = y + _convolve(history, params.window)[:, window.shape[2] :]
        # Row b's last inputs end at history position lengths[b] + P - 1.
        take = last[:, None] + torch.arange(window.shape[2], device=x.device)
        index = take[:, :, None].expand(-1, -1, u.shape[2])
        window = history.gather(1, index).flip(1).transpose(1, 2).contiguous()
    return y.to(x.dtype), SSMState(window, real, imag)


def _prefill_modes(
    params: SSMParams, u: Tensor, real: Tensor, imag: Tensor, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the modes add to the outputs (B, L, E), and their state after ``last[b]`` tokens, or all."""
    length = u.shape[1]
    block = min(length, _block_length(u, params.residues.shape[2]))
    powers = pole_powers(params.poles, block + 1)
    # The sum over the modes in float64: ETSC's terms are hundreds of times the taps they leave.
    k = _mode_taps(params.residues.double(), powers[..., :block]).to(u.dtype)
    whole = torch.nn.functional.pad(u, (0, 0, 0, -length % block)) if length % block else u
    y = _convolve(whole.reshape(-1, block, u.shape[2]), k).reshape(whole.shape)[:, :length]
    # Modes before channels, real parts over imaginary ones: with shared poles both products of a block are
    # of row-major matrices then, which BLAS is up to seven times faster at for a handful of modes.
    s = torch.stack((real, imag), dim=1).transpose(2, 3).contiguous()
    c = params.residues.permute(1, 2, 0).contiguous()
    powers = powers.to(u.dtype)
    powers = powers if powers.dim() == 3 else powers.permute(1, 2, 0, 3)
    for start in range(0, length, block):
        part = u[:, start : start + block]
        _add_free_response(y[:, start : start + block], c, powers, s)
        if last is None:
            taken = torch.full((len(u),), part.shape[1], device=u.device)
        else:
            taken = (last - start).clamp(0, part.shape[1])
            part = _align_right(part, taken)
        s = _advance_modes(powers, part, s, taken)
    real, imag = (plane.transpose(1, 2).contiguous() for plane in s.unbind(1))
    return y, real, imag


def _block_length(u: Tensor, modes: int) -> int:
    """Tokens between which the state is carried on. Inside a block a convolution costs in proportion to its
    length, or by FFT next to nothing more; between blocks every mode costs."""
    if u.device.type != "cpu" or modes > _DIRECT_TAPS:
        return _FFT_BLOCK
    return max(_SMALL_BLOCK, 1 << (modes - 1).bit_length())


def _convolve(u: Tensor, k: Tensor) -> Tensor:
    """``k`` applied to (B, L, E): directly where taps are few and the library is fast at it."""
    fast = u.device.type == "cpu" and u.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    few = min(k.shape[1], u.shape[1]) <= _DIRECT_TAPS
    return toeplitz_direct(u, k) if fast and few and not torch.is_grad_enabled() else toeplitz(u, k)


def _step_modes(params: SSMParams, u: Tensor, s_re: Tensor, s_im: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Re sum c s (B, E) and s = lam s + u as planes (B, E, N), for u (B, E).

    Poles are the float64 ones split in two numbers of the state's dtype. The small part goes
    into the sum first: added last it would be rounded away, and a pole that is off by rounding
    turns a little further with every token (measured on ETSC's 795 modes: logits are off by
    1.8e-5 instead of 9.8e-5).
    """
    dtype = s_re.dtype
    coarse = params.poles.to(dtype)
    fine = (params.poles - coarse).to(dtype)
    (re, im), (re_fine, im_fine) = coarse.unbind(-2), fine.unbind(-2)
    after_re = torch.addcmul(u.unsqueeze(-1), re_fine, s_re).addcmul_(im_fine, s_im, value=-1)
    after_re = after_re.addcmul_(re, s_re).addcmul_(im, s_im, value=-1)
    after_im = (re_fine * s_im).addcmul_(im_fine, s_re).addcmul_(re, s_im).addcmul_(im, s_re)
    c_re, c_im = params.residues.unbind(-2)
    # Mode by mode, then summed: the sums of the two parts alone are large and cancel.
    y = (after_re * c_re).addcmul_(after_im, c_im, value=-1).sum(-1)
    return y, after_re, after_im


def taps(params: SSMParams, length: int) -> Tensor:
    """The effective taps k^[i] = h[i] + Re sum_m c[m] lam[m]^i, (E, ``length``), in float64.

    What a conversion is judged by: computed from the stored numbers, so rounding shows, and with
    powers in the CPU's widest type, so that their own rounding does not.
    """
    channels = params.window.shape[0]
    wanted = min(length, max(64, _POWERS_BYTES // (16 * params.poles[..., 0, :].numel() + 1)))
    squares = [torch.complex(*params.poles.double().cpu().unbind(-2)).numpy().astype(np.clongdouble)]
    while 1 << (len(squares) - 1) < wanted:
        squares.append(squares[-1] * squares[-1])
    block, turn = 1 << (len(squares) - 1), squares[-1]
    powers = _power_table(_as_tensors(squares[:-1] or squares, params.poles.device), block)
    residues = torch.complex(*params.residues.double().unbind(-2))
    k = powers.new_empty(channels, length)
    # In blocks, the residues turned on by lam^block each time: memory stays at one block of powers.
    c, turned = residues, np.ones_like(turn)
    for start in range(0, length, block):
        stop = min(start + block, length)
        k[:, start:stop] = _mode_taps(torch.stack((c.real, c.imag), dim=-2), powers[..., : stop - start])
        turned = turned * turn
        c = residues * _as_tensors([turned], residues.device)[0]
    width = min(length, params.window.shape[1])
    k[:, :width] += params.window[:, :width].double()
    return k


def pole_powers(poles: Tensor, length: int) -> Tensor:
    """lam^0 .. lam^(length-1) as planes, (2, N, length) or (E, 2, N, length), in float64.

    By repeated squaring: a square's rounding doubles with the next, and is length float64 roundings
    in the end.
    """
    squares = [torch.complex(*poles.double().unbind(-2))]
    while 1 << len(squares) < length:
        squares.append(squares[-1] * squares[-1])
    return _power_table(squares, length)


def _power_table(squares: list[Tensor], length: int) -> Tensor:
    """lam^0 .. lam^(length-1) as planes from lam^(2^j), j = 0, 1, ..."""
    powers = torch.ones((*squares[0].shape, 1), dtype=squares[0].dtype, device=squares[0].device)
    for square in squares:
        powers = torch.cat((powers, powers * square.unsqueeze(-1)), dim=-1)
    powers = powers[..., :length]
    return torch.stack((powers.real, powers.imag), dim=-3)


def _as_tensors(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(array.astype(np.complex128)).to(device) for array in arrays]


def _mode_taps(residues: Tensor, powers: Tensor) -> Tensor:
    """Re sum_m c[m] lam[m]^i, (E, L), in the residues' dtype."""
    powers = powers.to(residues.dtype)
    signed = torch.stack((residues[:, 0], -residues[:, 1]), dim=1)
    if powers.dim() == 3:
        return signed.flatten(1) @ powers.flatten(0, 1)
    return torch.einsum("ecn,ecnl->el", signed, powers)


def _add_free_response(y: Tensor, c: Tensor, powers: Tensor, s: Tensor) -> None:
    """Add to y (B, L, E) what the state (B, 2, N, E) alone contributes: Re sum_m c[m] lam[m]^(j+1) s_m."""
    w = _times(c, s)
    w[:, 1].neg_()
    later = powers[..., 1 : y.shape[1] + 1]
    if powers.dim() == 3:
        y.baddbmm_(later.flatten(0, 1).T.expand(len(y), -1, -1), w.flatten(1, 2))
    else:
        y += torch.einsum("bcne,cnel->ble", w, later)


def _advance_modes(powers: Tensor, u: Tensor, s: Tensor, last: Tensor) -> Tensor:
    """The state after ``last[b]`` tokens, lam^last s + sum_{j<last} lam^(last-1-j) u[j], for right-aligned
    u (B, L, E)."""
    after = _times(powers[..., last].movedim(-1, 0).reshape(len(u), *powers.shape[:2], -1), s)
    reverse = powers[..., : u.shape[1]].flip(-1)
    if powers.dim() == 3:
        after.flatten(1, 2).baddbmm_(reverse.flatten(0, 1).expand(len(u), -1, -1), u)
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


def channels_of(params: SSMParams, part: slice) -> SSMParams:
    """The recurrence of some channels alone."""
    poles = params.poles if params.poles.dim() == 2 else params.poles[part]
    return SSMParams(params.window[part], poles, params.residues[part])


def to_dtype(params: SSMParams, dtype: torch.dtype) -> SSMParams:
    """The same recurrence stored at ``dtype``, never below float32; poles stay float64."""
    kept = working_dtype(dtype)
    return SSMParams(params.window.to(kept), params.poles.double(), params.residues.to(kept))
