"""Kernels and recurrences of a model: finding them, and putting one in the place of the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import BiConv, LongConv, RecurrentConv
from tnnlm.ops.recurrence import Params


def attach(model: CausalLM, layers: Sequence[Params]) -> CausalLM:
    """A copy of ``model`` whose long convolutions are replaced by the given recurrences."""
    # Kernels are not copied: the recurrences stand in their place.
    memo = {id(block.mixer.conv): None for block in model.layers}
    converted = copy.deepcopy(model, memo)
    for block, params in zip(converted.layers, layers, strict=True):
        block.mixer.conv = RecurrentConv(params)
    return converted.eval().requires_grad_(False)


@contextmanager
def in_recurrent_form(model: CausalLM, convs: Sequence[RecurrentConv]) -> Iterator[CausalLM]:
    """``model`` itself, with the given recurrences in the place of its long convolutions for the length
    of a block: no second copy of its weights, which may be many or lie on other devices."""
    own = [block.mixer.conv for block in model.layers]
    try:
        for block, conv in zip(model.layers, convs, strict=True):
            block.mixer.conv = conv
        yield model
    finally:
        for block, before in zip(model.layers, own, strict=True):
            block.mixer.conv = before


def kernels(model: CausalLM) -> list[Kernel]:
    """The kernel of every layer.

    Raises:
        UserError: if the model is converted already.
    """
    found = [block.mixer.conv for block in model.layers]
    parallel = [conv.kernel for conv in found if isinstance(conv, LongConv)]
    if any(isinstance(conv, BiConv) for conv in found):
        raise UserError("a two-sided model has no recurrent form: its outputs depend on tokens to come")
    if len(parallel) < len(found):
        raise UserError("this model is converted already: convert the checkpoint it came from")
    return parallel


def recurrences(model: CausalLM) -> list[Params]:
    """The recurrence of every layer of a converted model."""
    found = [block.mixer.conv for block in model.layers]
    return [conv.params for conv in found if isinstance(conv, RecurrentConv)]
