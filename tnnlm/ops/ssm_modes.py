"""Step of a diagonal recurrence, mode by mode, which a compiler fuses into one loop over rows and channels.

The loop reads each number of the state once and writes it once. A sum over the modes as a dimension would be
a second loop. Dimensions as in :mod:`tnnlm.ops.ssm`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.ops.ssm import SSMParams, SSMState

MOST_MODES = 16
"""Largest number of modes that are written out, because each makes the compiled code longer."""


class ModesState(NamedTuple):
    """State of :class:`~tnnlm.ops.ssm.SSMParams` in parts that are views of its tensors."""

    window: Tensor
    """Last P - 1 inputs, newest first, (B, P - 1, E)."""
    real: tuple[Tensor, ...]
    """Real part of s for each mode, (B, E)."""
    imag: tuple[Tensor, ...]
    """Imaginary part of s for each mode, (B, E)."""

    @classmethod
    def of(cls, state: SSMState) -> ModesState:
        """Return the parts of a state."""
        return cls(state.window.mT, state.real.unbind(-1), state.imag.unbind(-1))

    @property
    def parts(self) -> list[Tensor]:
        """All parts, in order."""
        return [self.window, *self.real, *self.imag]


class SSMByMode(SSMParams):
    """Recurrence whose step takes and returns a :class:`ModesState`."""

    __slots__ = ()

    def step(self, x: Tensor, state: ModesState, active: Tensor | None = None) -> tuple[Tensor, ModesState]:  # type: ignore[override]
        """Process one token x (B, E); ``active`` is not supported. See :meth:`SSMParams.step`."""
        assert active is None
        u = x.to(self.residues.dtype)
        coarse = self.poles.to(u.dtype)
        fine = (self.poles - coarse).to(u.dtype)
        y, real, imag = torch.zeros_like(u), list[Tensor](), list[Tensor]()
        for mode, (s_re, s_im) in enumerate(zip(state.real, state.imag, strict=True)):
            (re, im), (re_fine, im_fine) = (part[..., mode].unbind(-1) for part in (coarse, fine))
            after_re = (u + re_fine * s_re - im_fine * s_im) + re * s_re - im * s_im
            after_im = (re_fine * s_im + im_fine * s_re) + re * s_im + im * s_re
            c_re, c_im = self.residues[..., mode].unbind(-1)
            y = y + (after_re * c_re - after_im * c_im)
            real.append(after_re)
            imag.append(after_im)
        window = state.window
        if self.window.shape[1]:
            recent = torch.cat((u.unsqueeze(1), window), dim=1)
            y = y + (recent * self.window.mT).sum(1)
            window = recent[:, :-1]
        return y.to(x.dtype), ModesState(window, tuple(real), tuple(imag))
