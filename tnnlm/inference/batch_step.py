"""Decoding step of a batch that changes the state in place; :mod:`tnnlm.inference.aot` compiles it.

The state is passed as a list of tensors, with one tensor for each mode of a recurrence.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from tnnlm.inference.flat_step import parts_read, with_parts_read
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import within_turns
from tnnlm.ops.recurrence import changed_parts, read_parts, with_read_parts
from tnnlm.ops.ssm import SSMState
from tnnlm.ops.ssm_modes import MOST_MODES, ModesState


class BatchStep(nn.Module):
    """Wrapper of ``step`` that changes the parts of the state in place, and returns the logits.

    It does no work for later tokens.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, *parts: Tensor) -> tuple[Tensor]:
        given = iter(parts)
        before: list[Any] = []
        for layer in self.model.init_state(1).layers:
            if _by_mode(layer):
                modes = layer.real.shape[-1]
                window, *planes = (next(given) for _ in range(1 + 2 * modes))
                before.append(ModesState(window, tuple(planes[:modes]), tuple(planes[modes:])))
            else:
                before.append(with_read_parts(layer, given))
        with within_turns(self.model, by_mode=True):
            logits, after = self.model.step(tokens, ModelState(tuple(before)))
        for old, new in zip(before, after.layers, strict=True):
            for target, part in zip(_changed(old), _changed(new), strict=True):
                target.copy_(part)
        return (logits,)


def ordered(state: ModelState) -> ModelState:
    """Return a state whose parts have the order of memory that a compiled step assumes, copied if needed."""
    return with_parts_read(state, (part.contiguous() for part in parts_read(state)))


def batch_parts(state: ModelState) -> list[Tensor]:
    """Return the parts of an :func:`ordered` state that :class:`BatchStep` takes; they are views."""
    parts: list[Tensor] = []
    for layer in state.layers:
        parts += ModesState.of(layer).parts if _by_mode(layer) else read_parts(layer)
    return parts


def _by_mode(layer: Any) -> TypeGuard[SSMState]:
    return isinstance(layer, SSMState) and 0 < layer.real.shape[-1] <= MOST_MODES


def _changed(layer: Any) -> list[Tensor]:
    return layer.parts if isinstance(layer, ModesState) else changed_parts(layer)
