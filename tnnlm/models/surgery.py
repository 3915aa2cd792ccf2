"""Kernels and recurrences of any module tree: finding them, and putting one in the place of the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import BiConv, LongConv, RecurrentConv
from tnnlm.ops.recurrence import Params

M = TypeVar("M", bound=nn.Module)


def attach(model: M, layers: Sequence[Params], *, inplace: bool = False) -> M:
    """Replace the long convolutions of ``model``, at any depth, by the given recurrences.

    Args:
        model: any module that contains :class:`~tnnlm.modules.LongConv` and is none itself.
        layers: one per convolution, in the order of ``model.modules()``. A convolution that is registered
            in several places counts once, and is replaced in all of them.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        the copy, or ``model``, in eval mode and without gradients.
    """
    names = _names_of_convs(model)
    # Kernels are not copied: the recurrences stand in their place.
    memo = {id(model.get_submodule(places[0])): None for places in names}
    converted = model if inplace else copy.deepcopy(model, memo)
    for places, params in zip(names, layers, strict=True):
        conv = RecurrentConv(params)
        for place in places:
            parent, _, name = place.rpartition(".")
            setattr(converted.get_submodule(parent), name, conv)
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


def kernels(model: nn.Module) -> list[Kernel]:
    """The kernel of every long convolution, in the order of ``model.modules()``.

    Raises:
        UserError: if there is none, because the model is converted already, or for another reason.
    """
    found = [module.kernel for module in model.modules() if isinstance(module, LongConv)]
    if found:
        return found
    if any(isinstance(module, BiConv) for module in model.modules()):
        raise UserError("a two-sided model has no recurrent form: its outputs depend on tokens to come")
    if any(isinstance(module, RecurrentConv) for module in model.modules()):
        raise UserError("this model is converted already", "convert the checkpoint it came from")
    raise UserError(f"{type(model).__name__} contains no LongConv: there is nothing to convert")


def recurrences(model: nn.Module) -> list[Params]:
    """The recurrence of every convolution of a converted model, in the order of ``model.modules()``."""
    return [module.params for module in model.modules() if isinstance(module, RecurrentConv)]


def _names_of_convs(model: nn.Module) -> list[list[str]]:
    """Of every long convolution, all the names under which it is registered."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LongConv):
            names.setdefault(id(module), []).append(name)
    return list(names.values())
