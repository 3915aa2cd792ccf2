"""Conversion of kernels to recurrences, for a single kernel or all layers of any module tree.

The methods need neither training nor data; :mod:`tnnlm.conversion.methods` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.horizon import MAX_HORIZON, ROUNDING, auto_horizon, tail_energy
from tnnlm.conversion.methods import convert
from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.source import LayerConversion, Source, moved
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.backbone import Backbone
from tnnlm.models.surgery import M, attach, kernels
from tnnlm.modules import LongConv
from tnnlm.ops.recurrence import to_device

REACH = 8
"""Number of training lengths up to which a conversion with a tolerance has to keep it."""
_FIRST_LENGTH = 512
"""Lags at which the search for a horizon starts if the training length is unknown."""


def convert_kernel(
    kernel: Kernel,
    recipe: ConversionConfig,
    horizon: int,
    progress: Progress = silent,
    max_length: int | None = None,
) -> LayerConversion:
    """Return the recurrence that matches ``kernel`` at lags below ``horizon``.

    The taps are bit-identical to those that training uses. The algebra on them is in float64; the
    parameters are stored in the dtype of the taps (at least float32), poles in float64.

    Methods with a tolerance keep it on the horizon, and also on ``REACH`` training lengths if the horizon
    covers the kernel. If ``recipe.horizon`` is ``auto``, method ``auto`` keeps it there for every kernel.

    Args:
        kernel: Kernel to convert.
        recipe: Method, order, tolerance and further settings of the conversion.
        horizon: Horizon in lags.
        progress: Progress bar for long loops.
        max_length: Training length in steps; None takes the horizon.

    Raises:
        UserError: If the taps are not finite, the settings don't fit them, or the tolerance can't be met.
    """
    with torch.no_grad():
        k = kernel(max(2 * horizon, kernel.support or 0))
        finite = tail_energy(k, horizon) <= ROUNDING**2
        promised = finite or (recipe.method == "auto" and recipe.horizon == "auto")
        reach = max(2 * horizon, REACH * (max_length or horizon))
        longer = kernel(reach) if promised and recipe.method in ("auto", "balanced") else None
        own = kernel.recurrence()
        if own is not None:  # Its tensors may be trainable parameters of the kernel.
            own = type(own)(*(tensor.detach() for tensor in own))
        source = Source(k[:, :horizon], kernel.decay, own, finite, longer, 0 if longer is None else reach)
        return convert(source, recipe, progress)


def convert_layers(
    model: nn.Module,
    recipe: ConversionConfig,
    progress: Progress = silent,
    max_length: int | None = None,
    device: torch.device | None = None,
) -> tuple[int, list[LayerConversion]]:
    """Return the horizon and the recurrence of every layer of a model.

    Args:
        model: Model in its parallel form.
        recipe: Method, horizon, tolerance and further settings of the conversion.
        progress: Progress bar for long loops.
        max_length: Training length in steps, see :func:`convert_model`.
        device: Device to convert on, see :func:`convert_kernels`.

    Raises:
        UserError: If the model is already converted, or a kernel can't be converted.
    """
    if max_length is None and isinstance(model, Backbone):
        max_length = model.config.max_length
    return convert_kernels(kernels(model), max_length, recipe, progress, device)


def convert_kernels(
    found: Sequence[Kernel],
    max_length: int | None,
    recipe: ConversionConfig,
    progress: Progress = silent,
    device: torch.device | None = None,
) -> tuple[int, list[LayerConversion]]:
    """Return the horizon and the recurrence of every kernel, as :func:`convert_layers` does for a model.

    Kernels are converted one after the other, so that the memory is that of the largest.

    Args:
        found: Kernels, one per layer.
        max_length: Training length in steps; None if it is unknown.
        recipe: Method, horizon, tolerance and further settings of the conversion.
        progress: Progress bar for long loops.
        device: Device to which a copy of each kernel is moved while it is converted; the recurrences are then
            on the CPU. None converts every kernel where it is.

    Raises:
        UserError: If a kernel can't be converted.
    """
    n = _horizon(found, max_length, recipe.horizon, device)
    layers = []
    for index, kernel in enumerate(progress(found, f"converting layers ({recipe.method})")):
        try:
            layer = convert_kernel(moved(kernel, device), recipe, n, progress, max_length)
        except UserError as error:
            raise UserError(f"layer {index}: {error.reason}", error.remedy) from None
        layers.append(layer if device is None else layer._replace(params=to_device(layer.params, "cpu")))
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
        model: A :class:`~tnnlm.models.causal_lm.CausalLM`, or any module that contains long convolutions at
            any depth. The weights of its other submodules are unchanged.
        recipe: Settings of the conversion; None builds them from ``options``.
        max_length: Training length in steps, the horizon of kernels that never decay. None takes it from
            the configuration of a ``CausalLM``; other modules need it only for such kernels.
        inplace: Convert ``model`` itself instead of a copy.
        options: Fields of :class:`tnnlm.config.schema.ConversionConfig`, such as ``method="balanced"``.

    Returns:
        Converted copy, or ``model`` itself, in eval mode and without gradients. Its convolutions are
        :class:`~tnnlm.modules.RecurrentConv` with ``init_state``, ``prefill`` and ``step``.

    Raises:
        UserError: If ``model`` contains no long convolution, for example because it is already converted,
            or a kernel can't be converted.
    """
    if isinstance(model, LongConv):
        raise UserError(
            "model: a LongConv alone can't be replaced",
            "pass the module that contains it, or wrap it in nn.Sequential",
        )
    _, layers = convert_layers(model, recipe or ConversionConfig(**options), max_length=max_length)
    return attach(model, [converted.params for converted in layers], inplace=inplace)


def _horizon(
    found: Sequence[Kernel], max_length: int | None, horizon: int | str, device: torch.device | None
) -> int:
    if horizon != "auto":
        return int(horizon)
    needed = []
    for index, kernel in enumerate(found):
        lags = auto_horizon(moved(kernel, device), max_length or _FIRST_LENGTH) or max_length
        if lags is None:
            raise UserError(
                f"layer {index}: the kernel does not decay within {MAX_HORIZON} lags",
                "set max_length to the training length, or set horizon",
            )
        needed.append(lags)
    return max(needed)
