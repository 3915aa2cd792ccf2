"""Recurrent form of a long convolution, which replaces ``LongConv`` after conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnnlm.ops.recurrence import Params, State, steps
from tnnlm.precision import KeepsFloat32


class RecurrentConv(KeepsFloat32):
    """Convolution as a small linear recurrence; its parameters are buffers, because they are not trained."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self._params_type: Callable[..., Params] = type(params)
        self._names = tuple(params._asdict())
        for name, tensor in params._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def params(self) -> Params:
        """Parameters of the recurrence as a NamedTuple."""
        return self._params_type(*(getattr(self, name) for name in self._names))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, L, E) for x (B, L, E), starting from the initial state."""
        return self.prefill(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token."""
        return self.params.init_state(batch_size)

    def prefill(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Process the tokens of x (B, L, E); see :meth:`tnnlm.ops.recurrence.Recurrence.prefill`."""
        # Autocast would run the matrix products of the recurrence in bf16.
        with torch.autocast(x.device.type, enabled=False):
            return self.params.prefill(x, state, lengths)

    def step(self, x: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
        """Process one token x (B, E); see :meth:`tnnlm.ops.recurrence.Recurrence.step`."""
        with torch.autocast(x.device.type, enabled=False):
            return self.params.step(x, state, active)

    def steps(self, x: Tensor, state: State) -> tuple[Tensor, list[State]]:
        """Process K tokens x (B, K, E) and keep each state; see :func:`tnnlm.ops.recurrence.steps`."""
        with torch.autocast(x.device.type, enabled=False):
            return steps(self.params, x, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Poles follow device moves but no casts: prefill raises them to high powers.
        poles = self._buffers.get("poles")
        super()._apply(fn, recurse)
        if poles is not None:
            self._buffers["poles"] = poles.to(device=fn(poles).device)
        return self
