"""Every recurrent form of a convolution behind one set of functions.

A form is a module with parameters and state as NamedTuples of tensors and the functions below;
what is called is chosen by the parameters' type. All else (modules, conversion, what lies on disk)
knows this module alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tnnlm.ops import companion, ssm
from tnnlm.ops.companion import CompanionParams, CompanionState
from tnnlm.ops.ssm import SSMParams, SSMState

Params: TypeAlias = SSMParams | CompanionParams
State: TypeAlias = SSMState | CompanionState

_FORMS: dict[type[Params], Any] = {SSMParams: ssm, CompanionParams: companion}


def init_state(params: Params, batch_size: int) -> State:
    """The state before the first token: zeros."""
    state: State = _FORMS[type(params)].init_state(params, batch_size)
    return state


def step(params: Params, x: Tensor, state: State, active: Tensor | None = None) -> tuple[Tensor, State]:
    """Advance by one token x (B, E); rows where ``active`` (B,) is False keep their state."""
    y, after = _FORMS[type(params)].step(params, x, state, active)
    return y, after


def prefill(params: Params, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
    """Advance by the tokens of x (B, L, E) at once; see :func:`tnnlm.ops.ssm.prefill`."""
    y, after = _FORMS[type(params)].prefill(params, x, state, lengths)
    return y, after


def taps(params: Params, length: int) -> Tensor:
    """The effective taps, (E, ``length``), in float64."""
    k: Tensor = _FORMS[type(params)].taps(params, length)
    return k


def state_bytes(params: Params) -> int:
    """Bytes of state per sequence."""
    return sum(tensor.numel() * tensor.element_size() for tensor in init_state(params, 1))


def multiply_adds(params: Params) -> int:
    """Multiply-adds of one step."""
    return int(_FORMS[type(params)].multiply_adds(params))


def order(params: Params) -> int:
    """Real state numbers per channel."""
    return int(_FORMS[type(params)].order(params))


def largest_pole(params: Params) -> float:
    """Largest modulus of a pole; 0 where there is none."""
    return float(_FORMS[type(params)].largest_pole(params))


def channels_of(params: Params, part: slice) -> Params:
    """The recurrence of some channels alone."""
    some: Params = _FORMS[type(params)].channels_of(params, part)
    return some


def to_dtype(params: Params, dtype: torch.dtype) -> Params:
    """The same recurrence stored at ``dtype``, never below float32; poles stay float64."""
    stored: Params = _FORMS[type(params)].to_dtype(params, dtype)
    return stored


def from_tensors(tensors: Mapping[str, Tensor]) -> Params:
    """The parameters that are stored under their fields' names; other names are ignored.

    Raises:
        KeyError: if no form's fields are all there.
    """
    for form in _FORMS:
        if all(name in tensors for name in form._fields):
            params: Params = form(*(tensors[name] for name in form._fields))
            return params
    raise KeyError(f"recurrence among {', '.join(tensors) or 'nothing'}")
