"""Functions that find the kernels and recurrences of any module and replace one by the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import BiConv, LongConv, RecurrentConv, TapsConv
from tnnlm.modules.fused import fused_parts
from tnnlm.ops.recurrence import Params, named_tensors, to_device, within_turn, without_branches
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


def in_parallel_form(converted: M, length: int, smallest_order: int) -> M:
    """Return a copy of a converted model that shares its weights and convolves with the taps of recurrences.

    A recurrence is linear, does not change with time and starts from zero. Its outputs on ``length`` tokens
    are therefore the convolution with its first ``length`` effective taps, whatever kernel it was made from.
    The taps are computed in float64 from the stored parameters. Evaluating a large recurrence so takes a
    fraction of the time; recurrences with fewer than ``smallest_order`` real numbers of state per channel
    are not replaced.

    Args:
        converted: Converted model.
        length: Largest number of tokens that the copy is evaluated on.
        smallest_order: Order from which on a recurrence is replaced.
    """
    return _with_convs(
        converted,
        {
            module: TapsConv(_taps_until_zero(module, length))
            for module in converted.modules()
            if isinstance(module, RecurrentConv) and module.params.order() >= smallest_order
        },
    )


@torch.no_grad()
def with_fixed_taps(model: M, length: int) -> M:
    """Return a copy of a model in its parallel form that shares its weights and holds ``length`` taps.

    It has the same outputs on ``length`` tokens, and does not evaluate its kernels again for every batch.
    """
    convs = [module for module in model.modules() if isinstance(module, LongConv)]
    return _with_convs(model, {conv: TapsConv(conv.kernel(length)) for conv in convs})


def _with_convs(model: M, replaced: Mapping[nn.Module, nn.Module]) -> M:
    """Return a copy of a model with other convolutions, which shares all modules that contain none of them.

    Packed layers, for example, can't be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if module in replaced:
            memo[id(module)] = replaced[module]
        elif not any(part in replaced for part in module.modules()):
            memo[id(module)] = module
    return copy.deepcopy(model, memo)


def _taps_until_zero(conv: RecurrentConv, length: int) -> Tensor:
    """Return the effective taps of a recurrence in the dtype of its state, without zeros at the end."""
    state = next(iter(named_tensors(conv.init_state(1)).values()))
    k = conv.params.taps(length)
    used = int(k.abs().amax(0).nonzero().max()) + 1 if bool(k.any()) else 1
    return k[:, :used].to(state.dtype)


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
