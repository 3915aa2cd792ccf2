"""The recurrent form of a long convolution: what conversion puts in the place of ``LongConv``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params, State
from tnnlm.precision import KeepsFloat32


class RecurrentConv(KeepsFloat32):
    """A convolution as a small linear recurrence. Its numbers are buffers: converted, not trained."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self._form: type[Params] = type(params)
        for name, tensor in params._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def params(self) -> Params:
        """The recurrence's parameters, as the ops take them."""
        tensors: Params = self._form(*(getattr(self, name) for name in self._form._fields))
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E), from an empty state."""
        return self.prefill(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch_size: int) -> State:
        """The state before the first token."""
        return recurrence.init_state(self.params, batch_size)

    def prefill(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Advance by the tokens of x (B, L, E); see :func:`tnnlm.ops.recurrence.prefill`."""
        # Autocast would run the matrix products of the recurrence in bf16.
        with torch.autocast(x.device.type, enabled=False):
            return recurrence.prefill(self.params, x, state, lengths)

    def step(self, x: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """Advance by one token x (B, E); see :func:`tnnlm.ops.recurrence.step`."""
        with torch.autocast(x.device.type, enabled=False):
            return recurrence.step(self.params, x, state, active)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Poles follow the device and nothing else: prefill raises them to high powers.
        poles = self._buffers.get("poles")
        super()._apply(fn, recurse)
        if poles is not None:
            self._buffers["poles"] = poles.to(device=fn(poles).device)
        return self
