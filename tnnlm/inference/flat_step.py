"""Decoding step between flat lists of tensors, which compiled packages and CUDA graphs take and return.

A step reads some parts of a state and changes some; the work for later tokens follows it. The lists are made
by hand, because pytrees take a tenth of a millisecond per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import within_turns
from tnnlm.ops.recurrence import (
    Params,
    changed_parts,
    read_parts,
    with_changed_parts,
    with_read_parts,
    work_ahead,
)


def parts_read(state: ModelState) -> list[Tensor]:
    """Return the parts of a state that a step reads, layer by layer."""
    return [part for layer in state.layers for part in read_parts(layer)]


def parts_changed(state: ModelState) -> list[Tensor]:
    """Return the parts of a state that a step changes, layer by layer."""
    return [part for layer in state.layers for part in changed_parts(layer)]


def with_parts_read(state: ModelState, parts: Iterable[Tensor]) -> ModelState:
    """Return a state with other parts that a step reads, in the order of :func:`parts_read`."""
    given = iter(parts)
    return ModelState(tuple(with_read_parts(layer, given) for layer in state.layers))


def flat_step(model: CausalLM, tokens: Tensor, empty: ModelState, parts: Iterable[Tensor]) -> list[Tensor]:
    """Run the step of a converted model without the work for later tokens.

    Args:
        model: Converted model.
        tokens: Token ids (B,).
        empty: State of a single row, for the parts that have no use in a step.
        parts: Parts of the state that the step reads, from :func:`parts_read`.

    Returns:
        The logits (B, V), followed by the parts of the state that the step changes.
    """
    with within_turns(model):
        logits, state = model.step(tokens, with_parts_read(empty, parts))
    return [logits, *parts_changed(state)]


def after_step(
    recurrences: Sequence[Params], state: ModelState, outputs: Iterable[Tensor]
) -> tuple[Tensor, ModelState]:
    """Return the logits and the state after a step, including the work for later tokens.

    Args:
        recurrences: Recurrences of the model's layers.
        state: State before the step.
        outputs: Tensors that :func:`flat_step` returned.
    """
    found = iter(outputs)
    logits = next(found)
    layers = [with_changed_parts(layer, found) for layer in state.layers]
    return logits, ModelState(work_ahead(recurrences, layers))
