"""Recurrent form of a convolution as a diagonal SSM: parameters, state, step and parallel prefill.

    s[t] = lam * s[t-1] + x[t]                                one state per channel and mode
    y[t] = sum_{p<P} h[p] x[t-p] + Re sum_m c[m] s_m[t]       effective taps h[i] + Re sum c lam^i

Complex numbers are stored as planes (re, im) of real tensors, so that casts can't drop the imaginary part and
the step can be compiled. Dimensions: B batch, L length, E channels, N modes, P window taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnnlm.ops.mode_sums import mode_sums
from tnnlm.ops.ssm_blocks import convolve, prefill_modes
from tnnlm.precision import working_dtype


class SSMState(NamedTuple):
    """Decoding state of one convolution, which has a fixed size and is never modified in place."""

    window: Tensor
    """Last P - 1 inputs, newest first, (B, E, max(P - 1, 0))."""
    real: Tensor
    """Real part of s, (B, E, N)."""
    imag: Tensor
    """Imaginary part of s, (B, E, N); separate from ``real``, so that a step doesn't have to stack them."""


class SSMParams(NamedTuple):
    """Parameters of a diagonal recurrence; a conjugate pair is stored once, with doubled residues.

    Poles are always float64, because prefill raises them to high powers; they are few. The step splits them
    into two numbers of the state's dtype.
    """

    window: Tensor
    """Taps of the most recent inputs, (E, P), index = lag; P may be 0."""
    poles: Tensor
    """Poles lam as planes, (2, N) if shared by all channels, else (E, 2, N); N may be 0."""
    residues: Tensor
    """Residues c as planes, (E, 2, N)."""

    @property
    def METHOD(self) -> str:
        """Conversion method that offers the recurrence if a kernel defines it: companion."""
        return "companion"

    def init_state(self, batch_size: int) -> SSMState:
        """Return the state before the first token: zeros, in the residues' dtype and on their device."""
        channels, _, modes = self.residues.shape
        inputs = max(self.window.shape[1] - 1, 0)
        new = self.residues.new_zeros
        planes = (new(batch_size, channels, modes) for _ in range(2))
        return SSMState(new(batch_size, channels, inputs), *planes)

    def step(self, x: Tensor, state: SSMState, active: Tensor | None = None) -> tuple[Tensor, SSMState]:
        """Process one token.

        Args:
            x: Inputs (B, E).
            state: State before the token.
            active: Boolean mask (B,); rows where it is False keep their state, as for padding.

        Returns:
            Outputs (B, E) in the dtype of ``x``, and the state after the token.
        """
        u = x.to(state.real.dtype)
        window, real, imag = before = [_channels_last(part) for part in state]
        y = None
        if self.residues.shape[2]:
            y, real, imag = _step_modes(self, u, real, imag)
        if self.window.shape[1]:
            recent = torch.cat((u.unsqueeze(1), window), dim=1)
            near = (recent * self.window.mT).sum(1)
            y = near if y is None else y + near
            window = recent[:, :-1]
        y = torch.zeros_like(u) if y is None else y
        after = [window, real, imag]
        if active is not None:
            row = active[:, None, None]
            after = [torch.where(row, new, old) for new, old in zip(after, before, strict=True)]
        return y.to(x.dtype), SSMState(*(part.mT for part in after))

    def prefill(self, x: Tensor, state: SSMState, lengths: Tensor | None = None) -> tuple[Tensor, SSMState]:
        """Process L tokens in blocks: a convolution within each block, two matrix products between blocks.

        Any split of a sequence into calls gives the same outputs and state up to rounding. Memory grows with
        L; split long prompts into chunks.

        Args:
            x: Inputs (B, L, E).
            state: State before the first token, initial or after earlier tokens.
            lengths: Number of tokens of each row, (B,). Padding after them doesn't change the state, and
                outputs at padding are undefined.

        Returns:
            Outputs (B, L, E) in the dtype of ``x``, and the state after the last token of each row.
        """
        dtype, length = state.real.dtype, x.shape[1]
        counts = None if lengths is None else lengths.to(x.device)
        y, (window, real, imag) = None, state
        if self.residues.shape[2]:
            y, real, imag = prefill_modes(self.poles, self.residues, x, real, imag, counts)
        if self.window.shape[1]:
            history = torch.cat((window.flip(-1).transpose(1, 2), x.to(dtype)), dim=1)
            near = convolve(history, self.window)[:, window.shape[2] :]
            y = near if y is None else y + near
            if counts is None:
                recent = history[:, length:]
            else:
                # The last inputs of row b end at position lengths[b] + P - 1 of the history.
                take = counts[:, None] + torch.arange(window.shape[2], device=x.device)
                recent = history.gather(1, take[:, :, None].expand(-1, -1, x.shape[2]))
            window = recent.flip(1).transpose(1, 2).contiguous()
        return torch.zeros_like(x) if y is None else y.to(x.dtype), SSMState(window, real, imag)

    def taps(self, length: int) -> Tensor:
        """Return the effective taps k^[i] = h[i] + Re sum_m c[m] lam[m]^i, (E, ``length``), in float64.

        They are computed from the stored parameters, so that the rounding of those is included, and with
        powers of more digits than float64 has, so that the rounding of powers is not.
        """
        coarse, fine = mode_sums(self.poles, self.residues, length)
        return coarse + fine + self._padded_window(length)

    def difference(self, k: Tensor) -> Tensor:
        """Return k - k^ for taps k (E, L), in float64, rounded at the end only if the residues are float64.

        Conversion errors are measured so, because the taps of an exact conversion differ by rounding only.
        """
        sums = mode_sums(self.poles, self.residues, k.shape[1])
        return sums.taken_from(k.double(), self._padded_window(k.shape[1]))

    def multiply_adds(self) -> int:
        """Return the multiply-adds of one step: per channel, six for each mode and one per window tap."""
        channels, _, modes = self.residues.shape
        return channels * (6 * modes + self.window.shape[1])

    def order(self) -> int:
        """Return the state size per channel: a conjugate pair counts 2, a real pole or a window tap 1."""
        numbers = 1 + (self.poles[..., 1, :] != 0).int()
        if numbers.dim() == 2:
            # The maximum over channels; modes that are padding have neither a pole nor a residue.
            used = (self.poles != 0).any(-2) | (self.residues != 0).any(-2)
            return self.window.shape[1] + int((numbers * used).sum(1).amax())
        return self.window.shape[1] + int(numbers.sum())

    def largest_pole(self) -> float:
        """Return the largest modulus of all poles; 0 without poles."""
        return float(torch.linalg.vector_norm(self.poles, dim=-2).max()) if self.poles.numel() else 0.0

    def channels_of(self, part: slice) -> SSMParams:
        """Return the recurrence restricted to a slice of the channels."""
        poles = self.poles if self.poles.dim() == 2 else self.poles[part]
        return SSMParams(self.window[part], poles, self.residues[part])

    def _padded_window(self, length: int) -> Tensor:
        return pad(self.window[:, :length].double(), (0, max(0, length - self.window.shape[1])))

    def to_dtype(self, dtype: torch.dtype) -> SSMParams:
        """Return the recurrence with its tensors cast to ``dtype``, at least float32; poles stay float64."""
        kept = working_dtype(dtype)
        return SSMParams(self.window.to(kept), self.poles.double(), self.residues.to(kept))


def _channels_last(part: Tensor) -> Tensor:
    """Return (B, E, N) as (B, N, E), in the order of memory in which a CPU vectorises over the channels.

    States that a step returns have this order already.
    """
    turned = part.mT
    kept = turned.stride(-1) == 1 or turned.device.type != "cpu" or torch.compiler.is_exporting()
    return turned if kept else turned.contiguous()


def _step_modes(params: SSMParams, u: Tensor, s_re: Tensor, s_im: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs Re sum c s (B, E), and the next state s = lam s + u as planes (B, N, E).

    The float64 poles are split into two numbers of the state's dtype, a coarse and a fine part. The fine part
    is added first, because added last it would be rounded away, and the phase error of a rounded pole grows
    with every token (with the 795 modes of ETSC, the error of the logits is 1.8e-5 instead of 9.8e-5).
    """
    dtype = s_re.dtype
    coarse = params.poles.to(dtype)
    fine = (params.poles - coarse).to(dtype)
    (re, im), (re_fine, im_fine) = (_planes(part) for part in (coarse, fine))
    after_re = torch.addcmul(u.unsqueeze(1), re_fine, s_re).addcmul_(im_fine, s_im, value=-1)
    after_re = after_re.addcmul_(re, s_re).addcmul_(im, s_im, value=-1)
    after_im = (re_fine * s_im).addcmul_(im_fine, s_re).addcmul_(re, s_im).addcmul_(im, s_re)
    c_re, c_im = _planes(params.residues)
    # Real and imaginary products are combined for each mode before the sum: their separate sums are large and
    # cancel.
    y = (after_re * c_re).addcmul_(after_im, c_im, value=-1).sum(1)
    return y, after_re, after_im


def _planes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the planes of ([E,] 2, N) as two tensors (N, E), or (N, 1) for all channels together."""
    re, im = (numbers if numbers.dim() == 3 else numbers.unsqueeze(0)).permute(1, 2, 0)
    return re, im
