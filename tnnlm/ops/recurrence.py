"""Protocol of recurrences, the recurrent forms of a convolution.

A recurrence is a NamedTuple of parameter tensors with the methods of :class:`Recurrence`; its state is also a
NamedTuple. Modules, conversion and checkpoints use recurrences through this protocol only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from tnnlm.ops.companion import CompanionParams, CompanionState
from tnnlm.ops.multirate import MultirateParams, MultirateState, MultirateWithinTurn
from tnnlm.ops.ssm import SSMParams, SSMState

_State = TypeVar("_State")


class Recurrence(Protocol[_State]):
    """Parameters of a recurrent convolution with E channels, which are never modified in place."""

    @property
    def METHOD(self) -> str:
        """Conversion method that offers a recurrence of this type if a kernel defines it."""
        ...

    def init_state(self, batch_size: int) -> _State:
        """Return the state before the first token, which is zero."""
        ...

    def step(self, x: Tensor, state: _State, active: Tensor | None = None) -> tuple[Tensor, _State]:
        """Process one token x (B, E) and return output and next state.

        Rows where ``active`` (B,) is False keep their state.
        """
        ...

    def prefill(self, x: Tensor, state: _State, lengths: Tensor | None = None) -> tuple[Tensor, _State]:
        """Process the tokens of x (B, L, E) in parallel; see :meth:`tnnlm.ops.ssm.SSMParams.prefill`."""
        ...

    def taps(self, length: int) -> Tensor:
        """Return the effective taps, (E, ``length``), in float64."""
        ...

    def difference(self, k: Tensor) -> Tensor:
        """Return taps k (E, L) less the effective taps, in float64."""
        ...

    def multiply_adds(self) -> int:
        """Return the number of multiply-adds of one step."""
        ...

    def order(self) -> int:
        """Return the state size in real numbers per channel."""
        ...

    def largest_pole(self) -> float:
        """Return the largest modulus of all poles; 0 without poles."""
        ...

    def channels_of(self, part: slice) -> Recurrence[_State]:
        """Return the recurrence restricted to a slice of the channels."""
        ...

    def to_dtype(self, dtype: torch.dtype) -> Recurrence[_State]:
        """Return the recurrence with its tensors cast to ``dtype``, at least float32; poles stay float64."""
        ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def _asdict(self) -> dict[str, Any]: ...


Params: TypeAlias = Recurrence[Any]
State: TypeAlias = SSMState | CompanionState | MultirateState

_RECURRENCES: tuple[type[SSMParams] | type[CompanionParams] | type[MultirateParams], ...] = (
    SSMParams,
    CompanionParams,
    MultirateParams,
)


def state_bytes(params: Params) -> int:
    """Return the size of the state in bytes per sequence."""
    return sum(tensor.numel() * tensor.element_size() for tensor in params.init_state(1))


def ends_turn(layers: Sequence[Params], states: Sequence[Any]) -> bool:
    """Return whether the next step does work in any layer that is due once in several tokens.

    It reads a number from the device of the states for each layer that has such work.
    """
    pairs = zip(layers, states, strict=True)
    return any(isinstance(params, MultirateParams) and params.ends_turn(state) for params, state in pairs)


def within_turn(params: Params) -> Params:
    """Return the recurrence without the work that is due once in several tokens.

    Its steps equal those of ``params`` unless :func:`ends_turn`, and have no branches.
    """
    return MultirateWithinTurn(*params) if isinstance(params, MultirateParams) else params


def without_branches(params: Params) -> Params:
    """Return a recurrence with the same taps whose steps all do the same work: a window for ``multirate``."""
    if not isinstance(params, MultirateParams):
        return params
    k = params.taps(params.length())
    empty = k.new_zeros(2, 0)
    return SSMParams(k, empty, empty.expand(len(k), 2, 0).contiguous()).to_dtype(params.near.dtype)


def changed_parts(kind: type[State]) -> tuple[str, ...]:
    """Return the fields of a state that a step :func:`within_turn` changes."""
    return MultirateWithinTurn.CHANGED if issubclass(kind, MultirateState) else kind._fields


def to_device(params: Params, device: torch.device | str) -> Params:
    """Return the recurrence with its tensors on a device, without gradients."""
    made: Params = type(params)(*(tensor.detach().to(device) for tensor in params))
    return made


def from_tensors(tensors: Mapping[str, Tensor]) -> Params:
    """Return the recurrence whose fields are keys of ``tensors``; other keys are ignored.

    Raises:
        KeyError: If the fields of no recurrence are complete.
        ValueError: If the shapes of its tensors are inconsistent.
    """
    for kind in _RECURRENCES:
        if all(name in tensors for name in kind._fields):
            params = kind(*(tensors[name] for name in kind._fields))
            if isinstance(params, MultirateParams):
                params.check()
            return params
    raise KeyError(f"recurrence among {', '.join(tensors) or 'nothing'}")
