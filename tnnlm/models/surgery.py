"""Functions that find the kernels and recurrences of any module and replace one by the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import BiConv, LongConv, RecurrentConv
from tnnlm.modules.fused import fused_parts
from tnnlm.ops.recurrence import Params, to_device, within_turn, without_branches
from tnnlm.ops.ssm import SSMParams

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: M, replaced: Sequence[nn.Module] = ()) -> M:
    """Return a copy of a module whose tensors have the storage of the original's, without gradients.

    Replacing or moving tensors of the copy does not change the original; writing into them does.

    Args:
        model: Module to copy.
        replaced: Submodules to omit: the copy has None in their place, until the caller sets another module.
    """
    memo: dict[int, Any] = {id(module): None for module in replaced}
    for tensor in (*model.parameters(), *model.buffers()):
        alias = tensor.detach()
        shared = nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
        memo[id(tensor)] = shared
    return copy.deepcopy(model, memo)


def attach(model: M, layers: Sequence[Params], *, inplace: bool = False, shared: bool = False) -> M:
    """Replace the long convolutions of ``model``, at any depth, by the given recurrences.

    Args:
        model: Module that contains :class:`~tnnlm.modules.LongConv` and is not a ``LongConv`` itself.
        layers: Recurrences, one per convolution, in the order of ``model.modules()``. A convolution that is
            registered several times counts once, and is replaced everywhere.
        inplace: Whether to modify ``model`` instead of a copy.
        shared: Whether the copy shares the weights of ``model``, as :func:`shared_copy` does.

    Returns:
        The copy, or ``model``, in eval mode and without gradients.
    """
    names = _names_of_convs(model)
    # The copy needs no kernels, because recurrences replace them.
    convs = [model.get_submodule(places[0]) for places in names]
    if shared:
        converted = shared_copy(model, convs)
    else:
        converted = model if inplace else copy.deepcopy(model, {id(conv): None for conv in convs})
    for places, params in zip(names, layers, strict=True):
        conv = RecurrentConv(params)
        for place in places:
            parent, _, name = place.rpartition(".")
            setattr(converted.get_submodule(parent), name, conv)
    return converted.eval().requires_grad_(False)


def both_on(device: torch.device, model: M, converted: nn.Module) -> tuple[M, M]:
    """Return copies on a device of a model in its parallel form and of its conversion; they share weights."""
    layers = [to_device(params, device) for params in recurrences(converted)]
    parallel = shared_copy(model).to(device)
    return parallel, attach(parallel, layers, shared=True)


def all_decay(model: nn.Module) -> bool:
    """Return whether every kernel of a model in its parallel form states a decay.

    Kernels that don't may end abruptly, as those of finite length do, and have no small balanced recurrence.
    """
    return all(kernel.decay is not None for kernel in kernels(model))


@contextmanager
def in_recurrent_form(model: CausalLM, convs: Sequence[RecurrentConv]) -> Iterator[CausalLM]:
    """Replace the convolutions of ``model`` by the given recurrences within a ``with`` block.

    The weights are not copied: they may be large, or sharded over several devices.
    """
    originals = [block.mixer.conv for block in model.layers]
    try:
        for block, conv in zip(model.layers, convs, strict=True):
            block.mixer.conv = conv
        yield model
    finally:
        for block, original in zip(model.layers, originals, strict=True):
            block.mixer.conv = original


@contextmanager
def within_turns(model: CausalLM, by_mode: bool = False) -> Iterator[None]:
    """Omit the work for later tokens within a ``with`` block.

    Steps of a converted model then have no branches. :func:`tnnlm.ops.recurrence.work_ahead` must be applied
    to the state after each.

    Args:
        model: Converted model.
        by_mode: Whether recurrences with few modes take a state of :class:`tnnlm.ops.ssm_modes.ModesState`.
    """
    convs = [RecurrentConv(within_turn(params, by_mode)) for params in recurrences(model)]
    with in_recurrent_form(model, convs):
        yield


@contextmanager
def fused_steps(model: CausalLM) -> Iterator[None]:
    """Replace modules by those with fused operations within a ``with`` block.

    Steps then modify the state that they are given, and need a few launches per layer instead of dozens.
    """
    originals = []
    try:
        for block in model.layers:
            for name, part in fused_parts(block).items():
                originals.append((block, name, getattr(block, name)))
                setattr(block, name, part)
        yield
    finally:
        for block, name, original in originals:
            setattr(block, name, original)


def use_channels_last(model: nn.Module) -> None:
    """Store the parameters of recurrences in the order of memory in which a step on a CPU reads them."""
    for module in model.modules():
        if isinstance(module, RecurrentConv) and isinstance(module.params, SSMParams):
            for name, buffer in module.named_buffers():
                if buffer.dim() > 1:
                    setattr(module, name, buffer.movedim(0, -1).contiguous().movedim(-1, 0))


def use_windows(model: CausalLM) -> None:
    """Replace recurrences whose steps have branches by windows with the same taps, in place."""
    for block, params in zip(model.layers, recurrences(model), strict=True):
        block.mixer.conv = RecurrentConv(without_branches(params))


def kernels(model: nn.Module) -> list[Kernel]:
    """Return the kernels of all long convolutions, in the order of ``model.modules()``.

    Raises:
        UserError: If the model has no kernel, or is bidirectional or already converted.
    """
    found = [module.kernel for module in model.modules() if isinstance(module, LongConv)]
    if found:
        return found
    if any(isinstance(module, BiConv) for module in model.modules()):
        raise UserError("a bidirectional model has no recurrent form: its outputs depend on later tokens")
    if any(isinstance(module, RecurrentConv) for module in model.modules()):
        raise UserError("model: is already converted", "convert the original checkpoint")
    raise UserError(f"{type(model).__name__} contains no LongConv: there is nothing to convert")


def recurrences(model: nn.Module) -> list[Params]:
    """Return the recurrences of a converted model, in the order of ``model.modules()``."""
    return [module.params for module in model.modules() if isinstance(module, RecurrentConv)]


def _names_of_convs(model: nn.Module) -> list[list[str]]:
    """Return, for each long convolution, all names under which it is registered."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LongConv):
            names.setdefault(id(module), []).append(name)
    return list(names.values())
