"""Kernels to recurrences, one layer or any module tree, without training and without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.horizon import MAX_HORIZON, ROUNDING, auto_horizon, tail_energy
from tnnlm.conversion.methods import LayerConversion, Source, convert
from tnnlm.conversion.progress import Progress, silent
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.backbone import Backbone
from tnnlm.models.surgery import M, attach, kernels
from tnnlm.modules import LongConv

_FIRST_LENGTH = 512
"""lags that the search for a horizon starts at where no training length is known"""


def convert_kernel(
    kernel: Kernel, recipe: ConversionConfig, horizon: int, progress: Progress = silent
) -> LayerConversion:
    """The recurrence for ``kernel`` at lags below ``horizon``.

    The taps are those that training used, bit for bit; the algebra on them is in float64; what
    is returned is stored in the taps' dtype (at least float32), poles in float64.

    Raises:
        UserError: for taps that are not finite, and settings that don't fit them.
    """
    with torch.no_grad():
        k = kernel(2 * horizon)
        finite = tail_energy(k, horizon) <= ROUNDING**2
        own = kernel.recurrence()
        if own is not None:  # it may hold the very parameters that train
            own = type(own)(*(tensor.detach() for tensor in own))
        source = Source(k[:, :horizon], kernel.decay, own, finite)
        return convert(source, recipe, progress)


def convert_layers(
    model: nn.Module, recipe: ConversionConfig, progress: Progress = silent, max_length: int | None = None
) -> tuple[int, list[LayerConversion]]:
    """The horizon, and the recurrence of every layer by ``recipe``.

    Args:
        model: in its parallel form.
        recipe: method, horizon, tolerance and the like.
        progress: wraps what takes long, for a bar.
        max_length: as for :func:`convert_model`.

    Raises:
        UserError: if the model is converted already, or a kernel can't be converted.
    """
    if max_length is None and isinstance(model, Backbone):
        max_length = model.config.max_length
    return convert_kernels(kernels(model), max_length, recipe, progress)


def convert_kernels(
    found: Sequence[Kernel], max_length: int | None, recipe: ConversionConfig, progress: Progress = silent
) -> tuple[int, list[LayerConversion]]:
    """As :func:`convert_layers`, for kernels, one per layer, of a model that is not at hand as a whole.

    ``max_length``: the training length, None if it is unknown.
    """
    n = _horizon(found, max_length, recipe.horizon)
    layers = []
    for index, kernel in enumerate(progress(found, f"{recipe.method}, layers")):
        try:
            layers.append(convert_kernel(kernel, recipe, n, progress))
        except UserError as error:
            raise UserError(f"layer {index}: {error.reason}", error.remedy) from None
    return n, layers


def convert_model(
    model: M,
    recipe: ConversionConfig | None = None,
    *,
    max_length: int | None = None,
    inplace: bool = False,
    **options: Any,
) -> M:
    """Replace every :class:`~tnnlm.modules.LongConv` in ``model`` by its recurrence.

    Args:
        model: a :class:`~tnnlm.models.causal_lm.CausalLM`, or any module with long convolutions at any depth.
            All else in it stays as it is.
        recipe: how; None makes one of ``options``.
        max_length: the training length in steps, of which a kernel that never decays is converted; None
            takes it from the configuration of a ``CausalLM``, other modules may do without.
        inplace: change ``model`` itself instead of a copy.
        options: fields of :class:`tnnlm.config.schema.ConversionConfig`, such as ``method="balanced"``.

    Returns:
        the converted copy, or ``model``, in eval mode and without gradients. Each convolution in it is a
        :class:`~tnnlm.modules.RecurrentConv` with ``init_state``, ``prefill`` and ``step``.

    Raises:
        UserError: if there is no long convolution in ``model``, as in one that is converted already, or a
            kernel can't be converted.
    """
    if isinstance(model, LongConv):
        raise UserError("a LongConv alone can't be replaced", "convert the module around it, or a Sequential")
    _, layers = convert_layers(model, recipe or ConversionConfig(**options), max_length=max_length)
    return attach(model, [converted.params for converted in layers], inplace=inplace)


def _horizon(found: Sequence[Kernel], max_length: int | None, horizon: int | str) -> int:
    if horizon != "auto":
        return int(horizon)
    needed = []
    for index, kernel in enumerate(found):
        lags = auto_horizon(kernel, max_length or _FIRST_LENGTH) or max_length
        if lags is None:
            raise UserError(
                f"layer {index}: its kernel does not decay within {MAX_HORIZON} lags",
                "give max_length, the training length, or a horizon",
            )
        needed.append(lags)
    return max(needed)
