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

from tnnlm.ops.powers import mode_taps, power_table
from tnnlm.ops.ssm_blocks import convolve, prefill_modes
from tnnlm.precision import working_dtype

_POWERS_BYTES = 1 << 25
"""of powers of the poles that ``taps`` holds at a time"""


class SSMState(NamedTuple):
    """What is carried between tokens: fixed size, passed in and returned, never changed in place."""

    window: Tensor
    """the last P - 1 inputs, newest first as the taps are, (B, E, max(P - 1, 0))"""
    real: Tensor
    """Re s, (B, E, N)"""
    imag: Tensor
    """Im s, (B, E, N); a tensor of its own, so that no step has to copy the two into one"""


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

    def init_state(self, batch_size: int) -> SSMState:
        """The state before the first token: zeros, in the residues' dtype and on their device."""
        channels, _, modes = self.residues.shape
        inputs = max(self.window.shape[1] - 1, 0)
        new = self.residues.new_zeros
        planes = (new(batch_size, channels, modes) for _ in range(2))
        return SSMState(new(batch_size, channels, inputs), *planes)

    def step(self, x: Tensor, state: SSMState, active: Tensor | None = None) -> tuple[Tensor, SSMState]:
        """Advance by one token.

        Args:
            x: inputs (B, E).
            state: the state before this token.
            active: (B,) booleans; a row where it is False keeps its state (a pad step is an identity).

        Returns:
            outputs (B, E) in the dtype of ``x``, and the state after this token.
        """
        u = x.to(state.real.dtype)
        y, (window, real, imag) = torch.zeros_like(u), state
        if self.residues.shape[2]:
            y, real, imag = _step_modes(self, u, real, imag)
        if self.window.shape[1]:
            recent = torch.cat((u.unsqueeze(-1), window), dim=-1)
            y = y + torch.einsum("bep,ep->be", recent, self.window)
            window = recent[..., :-1]
        if active is not None:
            row = active[:, None, None]
            window, real, imag = (
                torch.where(row, new, old) for new, old in zip((window, real, imag), state, strict=True)
            )
        return y.to(x.dtype), SSMState(window, real, imag)

    def prefill(self, x: Tensor, state: SSMState, lengths: Tensor | None = None) -> tuple[Tensor, SSMState]:
        """Advance by L tokens in a few blocks: a convolution inside each, two matrix products between them.

        Any split of a sequence into calls gives the same outputs and state up to rounding. Memory
        grows with L: cut long prompts into chunks.

        Args:
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
        own = None if lengths is None else lengths.to(x.device)
        y, (window, real, imag) = torch.zeros_like(u), state
        if self.residues.shape[2]:
            y, real, imag = prefill_modes(self.poles, self.residues, u, real, imag, own)
        if self.window.shape[1]:
            history = torch.cat((window.flip(-1).transpose(1, 2), u), dim=1)
            y = y + convolve(history, self.window)[:, window.shape[2] :]
            last = torch.full((x.shape[0],), length, device=x.device) if own is None else own
            # Row b's last inputs end at history position lengths[b] + P - 1.
            take = last[:, None] + torch.arange(window.shape[2], device=x.device)
            index = take[:, :, None].expand(-1, -1, u.shape[2])
            window = history.gather(1, index).flip(1).transpose(1, 2).contiguous()
        return y.to(x.dtype), SSMState(window, real, imag)

    def taps(self, length: int) -> Tensor:
        """The effective taps k^[i] = h[i] + Re sum_m c[m] lam[m]^i, (E, ``length``), in float64.

        What a conversion is judged by: computed from the stored numbers, so rounding shows, and with
        powers in the CPU's widest type, so that their own rounding does not.
        """
        channels = self.window.shape[0]
        wanted = min(length, max(64, _POWERS_BYTES // (16 * self.poles[..., 0, :].numel() + 1)))
        squares = [torch.complex(*self.poles.double().cpu().unbind(-2)).numpy().astype(np.clongdouble)]
        while 1 << (len(squares) - 1) < wanted:
            squares.append(squares[-1] * squares[-1])
        block, turn = 1 << (len(squares) - 1), squares[-1]
        powers = power_table(_as_tensors(squares[:-1] or squares, self.poles.device), block)
        residues = torch.complex(*self.residues.double().unbind(-2))
        k = powers.new_empty(channels, length)
        # In blocks, the residues turned on by lam^block each time: memory stays at one block of powers.
        c, turned = residues, np.ones_like(turn)
        for start in range(0, length, block):
            stop = min(start + block, length)
            k[:, start:stop] = mode_taps(torch.stack((c.real, c.imag), dim=-2), powers[..., : stop - start])
            turned = turned * turn
            c = residues * _as_tensors([turned], residues.device)[0]
        width = min(length, self.window.shape[1])
        k[:, :width] += self.window[:, :width].double()
        return k

    def multiply_adds(self) -> int:
        """Multiply-adds of one step: six per channel and complex mode, one per window tap."""
        channels, _, modes = self.residues.shape
        return channels * (6 * modes + self.window.shape[1])

    def order(self) -> int:
        """Real state numbers per channel: a conjugate pair counts two, a real pole or a window tap one."""
        numbers = 1 + (self.poles[..., 1, :] != 0).int()
        if numbers.dim() == 2:
            # Of the channel that has most: modes that only fill up have neither pole nor residue.
            used = (self.poles != 0).any(-2) | (self.residues != 0).any(-2)
            return self.window.shape[1] + int((numbers * used).sum(1).amax())
        return self.window.shape[1] + int(numbers.sum())

    def largest_pole(self) -> float:
        """Largest modulus of a pole; 0 where there is none."""
        return float(torch.linalg.vector_norm(self.poles, dim=-2).max()) if self.poles.numel() else 0.0

    def channels_of(self, part: slice) -> SSMParams:
        """The recurrence of some channels alone."""
        poles = self.poles if self.poles.dim() == 2 else self.poles[part]
        return SSMParams(self.window[part], poles, self.residues[part])

    def to_dtype(self, dtype: torch.dtype) -> SSMParams:
        """The same recurrence stored at ``dtype``, never below float32; poles stay float64."""
        kept = working_dtype(dtype)
        return SSMParams(self.window.to(kept), self.poles.double(), self.residues.to(kept))


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


def _as_tensors(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(array.astype(np.complex128)).to(device) for array in arrays]
