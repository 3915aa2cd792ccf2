"""Protocol of recurrences, the recurrent forms of a convolution.

A recurrence is a NamedTuple of parameter tensors with the methods of :class:`Recurrence`; its state is also a
NamedTuple. Modules, conversion and checkpoints use recurrences through this protocol only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from tnnlm.ops.companion import CompanionParams, CompanionState
from tnnlm.ops.multirate import MultirateParams, MultirateWithinTurn
from tnnlm.ops.ssm import SSMParams, SSMState
from tnnlm.ops.ssm_modes import MOST_MODES, SSMByMode
from tnnlm.ops.turns import MultirateState

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


def steps(params: Params, x: Tensor, state: State) -> tuple[Tensor, list[State]]:
    """Process K tokens x (B, K, E) one after the other, and keep the state after each.

    Outputs and states are those of K calls of ``step``, bit for bit.

    Returns:
        Outputs (B, K, E), and K states.
    """
    outputs, states = [], list[State]()
    for token in x.unbind(1):
        y, state = params.step(token, state)
        outputs.append(y)
        states.append(state)
    return torch.stack(outputs, dim=1), states


def named_tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state by name, in order; those of a tuple have the names ``field.0``, ..."""
    named: dict[str, Tensor] = {}
    for name, part in state._asdict().items():
        tensors = {name: part} if isinstance(part, Tensor) else {f"{name}.{i}": t for i, t in enumerate(part)}
        named.update(tensors)
    return named


def with_tensors(state: _State, tensors: Iterable[Tensor]) -> _State:
    """Return a state of the structure of ``state`` with other tensors, in the order of that state."""
    given = iter(tensors)
    fields: Any = state
    parts = (next(given) if isinstance(part, Tensor) else tuple(next(given) for _ in part) for part in fields)
    made: _State = type(state)(*parts)
    return made


def check_state(state: State) -> None:
    """Check the numbers of a state from a file, whose shapes and dtypes are right.

    Raises:
        ValueError: If no sequence leads to them.
    """
    if isinstance(state, MultirateState):
        state.check()


def state_bytes(params: Params) -> int:
    """Return the size of the state in bytes per sequence."""
    return sum(part.numel() * part.element_size() for part in named_tensors(params.init_state(1)).values())


def work_ahead(layers: Sequence[Params], states: Sequence[State]) -> tuple[State, ...]:
    """Return the states after a step :func:`within_turn`, with the work for later tokens that is due.

    It reads a few numbers from the device of the states for each layer that has such work.
    """
    pairs = zip(layers, states, strict=True)
    return tuple(
        params.work_ahead(state)
        if isinstance(params, MultirateParams) and isinstance(state, MultirateState)
        else state
        for params, state in pairs
    )


def tokens_to_work_ahead(params: Params, state: State) -> int:
    """Return the number of tokens after which :func:`work_ahead` must be applied at the latest.

    It reads a number from the device of the state for each layer that has such work.
    """
    if isinstance(params, MultirateParams) and isinstance(state, MultirateState):
        return params.tokens_to_next_turn(state)
    return sys.maxsize


def within_turn(params: Params, by_mode: bool = False) -> Params:
    """Return the recurrence without the work for later tokens.

    Its steps have no branches, and :func:`work_ahead` must be applied after each. With ``by_mode``, those of
    a diagonal recurrence with few modes take a state of :class:`tnnlm.ops.ssm_modes.ModesState`.
    """
    if by_mode and isinstance(params, SSMParams) and 0 < params.residues.shape[2] <= MOST_MODES:
        return SSMByMode(*params)
    return MultirateWithinTurn(*params) if isinstance(params, MultirateParams) else params


def without_branches(params: Params) -> Params:
    """Return a recurrence with the same taps whose steps all do the same work: a window for ``multirate``."""
    if not isinstance(params, MultirateParams):
        return params
    k = params.taps(params.length())
    empty = k.new_zeros(2, 0)
    return SSMParams(k, empty, empty.expand(len(k), 2, 0).contiguous()).to_dtype(params.near.dtype)


def read_parts(state: State) -> list[Tensor]:
    """Return the parts of a state that a step :func:`within_turn` reads, in their order in memory."""
    if isinstance(state, MultirateState):
        return [getattr(state, name) for name in MultirateWithinTurn.READ]
    return _turned(state, state)


def with_read_parts(state: _State, parts: Iterator[Tensor]) -> _State:
    """Return a state with the next of ``parts`` as those that a step :func:`within_turn` reads."""
    return _with(state, MultirateWithinTurn.READ, parts)


def changed_parts(state: State) -> list[Tensor]:
    """Return the parts of a state that a step :func:`within_turn` changes, in their order in memory."""
    if isinstance(state, MultirateState):
        return [getattr(state, name) for name in MultirateWithinTurn.CHANGED]
    return _turned(state, state)


def with_changed_parts(state: _State, parts: Iterator[Tensor]) -> _State:
    """Return a state with the next of ``parts`` as those that a step :func:`within_turn` changes."""
    return _with(state, MultirateWithinTurn.CHANGED, parts)


def _with(state: _State, of_multirate: tuple[str, ...], parts: Iterator[Tensor]) -> _State:
    changed: Any = state
    names = of_multirate if isinstance(state, MultirateState) else changed._fields
    given = _turned(state, [next(parts) for _ in names])
    made: _State = changed._replace(**dict(zip(names, given, strict=True)))
    return made


def _turned(state: Any, parts: Iterable[Tensor]) -> list[Tensor]:
    """Return parts of a state with channels last in place of second, or the reverse, if a step turns them."""
    return [part.mT for part in parts] if isinstance(state, SSMState) else [*parts]


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
