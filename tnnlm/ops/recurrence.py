"""What every recurrent form of a convolution offers.

A form is a NamedTuple of tensors, its parameters, with the methods of :class:`Recurrence`; its state is
another one. Modules, conversion and checkpoints know forms by this protocol alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from tnnlm.ops.companion import CompanionParams, CompanionState
from tnnlm.ops.ssm import SSMParams, SSMState

_State = TypeVar("_State")


class Recurrence(Protocol[_State]):
    """The parameters of one recurrent convolution of E channels; nothing changes them in place."""

    def init_state(self, batch_size: int) -> _State:
        """The state before the first token: zeros."""
        ...

    def step(self, x: Tensor, state: _State, active: Tensor | None = None) -> tuple[Tensor, _State]:
        """Advance by one token x (B, E); rows where ``active`` (B,) is False keep their state."""
        ...

    def prefill(self, x: Tensor, state: _State, lengths: Tensor | None = None) -> tuple[Tensor, _State]:
        """Advance by the tokens of x (B, L, E) at once; see :meth:`tnnlm.ops.ssm.SSMParams.prefill`."""
        ...

    def taps(self, length: int) -> Tensor:
        """The effective taps, (E, ``length``), in float64."""
        ...

    def multiply_adds(self) -> int:
        """Multiply-adds of one step."""
        ...

    def order(self) -> int:
        """Real state numbers per channel."""
        ...

    def largest_pole(self) -> float:
        """Largest modulus of a pole; 0 where there is none."""
        ...

    def channels_of(self, part: slice) -> Recurrence[_State]:
        """The recurrence of some channels alone."""
        ...

    def to_dtype(self, dtype: torch.dtype) -> Recurrence[_State]:
        """The same recurrence stored at ``dtype``, never below float32; poles stay float64."""
        ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def _asdict(self) -> dict[str, Any]: ...


Params: TypeAlias = Recurrence[Any]
State: TypeAlias = SSMState | CompanionState

_FORMS: tuple[type[SSMParams] | type[CompanionParams], ...] = (SSMParams, CompanionParams)


def state_bytes(params: Params) -> int:
    """Bytes of state per sequence."""
    return sum(tensor.numel() * tensor.element_size() for tensor in params.init_state(1))


def from_tensors(tensors: Mapping[str, Tensor]) -> Params:
    """The parameters that are stored under their fields' names; other names are ignored.

    Raises:
        KeyError: if no form's fields are all there.
    """
    for form in _FORMS:
        if all(name in tensors for name in form._fields):
            return form(*(tensors[name] for name in form._fields))
    raise KeyError(f"recurrence among {', '.join(tensors) or 'nothing'}")
