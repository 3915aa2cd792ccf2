"""The recurrent form of a long convolution: what conversion puts in the place of ``LongConv``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnnlm.ops import ssm
from tnnlm.ops.ssm import SSMParams, SSMState
from tnnlm.precision import KeepsFloat32


class RecurrentConv(KeepsFloat32):
    """A convolution as a small linear recurrence. Its numbers are buffers: converted, not trained."""

    window: Tensor
    poles: Tensor
    residues: Tensor

    def __init__(self, params: SSMParams) -> None:
        super().__init__()
        for name, tensor in params._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def params(self) -> SSMParams:
        """The recurrence's parameters, as the ops take them."""
        return SSMParams(self.window, self.poles, self.residues)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E), from an empty state."""
        return self.prefill(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch_size: int) -> SSMState:
        """The state before the first token."""
        return ssm.init_state(self.params, batch_size)

    def prefill(self, x: Tensor, state: SSMState, lengths: Tensor | None = None) -> tuple[Tensor, SSMState]:
        """Advance by the tokens of x (B, L, E); see :func:`tnnlm.ops.ssm.prefill`."""
        # Autocast would run the matrix products of the recurrence in bf16.
        with torch.autocast(x.device.type, enabled=False):
            return ssm.prefill(self.params, x, state, lengths)

    def step(self, x: Tensor, state: SSMState, active: Tensor | None = None) -> tuple[Tensor, SSMState]:
        """Advance by one token x (B, E); see :func:`tnnlm.ops.ssm.step`."""
        with torch.autocast(x.device.type, enabled=False):
            return ssm.step(self.params, x, state, active)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Poles follow the device and nothing else: prefill raises them to high powers.
        poles = self.poles
        super()._apply(fn, recurse)
        self.poles = poles.to(device=self.poles.device)
        return self
