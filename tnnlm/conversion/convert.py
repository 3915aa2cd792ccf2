"""Kernels to recurrences, one layer or a whole model, without training and without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.horizon import ROUNDING, auto_horizon, tail_energy
from tnnlm.conversion.methods import Converted, Source, convert
from tnnlm.conversion.progress import Progress, silent
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels


def convert_kernel(
    kernel: Kernel, recipe: ConversionConfig, horizon: int, progress: Progress = silent
) -> Converted:
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


def model_horizon(model: CausalLM, horizon: int | str = "auto") -> int:
    """The horizon in lags: as given, or for ``auto`` the largest that a layer needs.

    A kernel that never dies out (no decay) is converted on the training length.
    """
    return _horizon(kernels(model), model.config.max_length, horizon)


def convert_layers(
    model: CausalLM, recipe: ConversionConfig, progress: Progress = silent
) -> tuple[int, list[Converted]]:
    """The horizon, and the recurrence of every layer by ``recipe``.

    Args:
        model: in its parallel form.
        recipe: method, horizon, tolerance and the like.
        progress: wraps what takes long, for a bar.

    Raises:
        UserError: if the model is converted already, or a kernel can't be converted.
    """
    return convert_kernels(kernels(model), model.config.max_length, recipe, progress)


def convert_kernels(
    found: Sequence[Kernel], max_length: int, recipe: ConversionConfig, progress: Progress = silent
) -> tuple[int, list[Converted]]:
    """As :func:`convert_layers`, for the kernels of a model that is not at hand as a whole.

    Args:
        found: one per layer.
        max_length: the training length.
        recipe: method, horizon, tolerance and the like.
        progress: wraps what takes long, for a bar.

    Raises:
        UserError: if a kernel can't be converted.
    """
    n = _horizon(found, max_length, recipe.horizon)
    layers = []
    for index, kernel in enumerate(progress(found, f"{recipe.method}, layers")):
        try:
            layers.append(convert_kernel(kernel, recipe, n, progress))
        except UserError as error:
            raise UserError(f"layer {index}: {error}") from None
    return n, layers


def convert_model(model: CausalLM, recipe: ConversionConfig | None = None, **options: Any) -> CausalLM:
    """A converted copy of ``model``, in eval mode; the trained one is left alone.

    Args:
        model: in its parallel form.
        recipe: how; None makes one of ``options``.
        options: fields of :class:`tnnlm.config.schema.ConversionConfig`, such as ``method="balanced"``.

    Raises:
        UserError: if the model is converted already, or a kernel can't be converted.
    """
    _, layers = convert_layers(model, recipe or ConversionConfig(**options))
    return attach(model, [converted.params for converted in layers])


def _horizon(found: Sequence[Kernel], max_length: int, horizon: int | str) -> int:
    if horizon != "auto":
        return int(horizon)
    needed = [auto_horizon(kernel, max_length) for kernel in found]
    return max(n if n is not None else max_length for n in needed)
