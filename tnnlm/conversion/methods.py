"""Conversion of taps to a recurrence by any method, and the choice among them for method ``auto``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.config.checks import check_settings
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.balanced import balanced
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.gradient import gradient
from tnnlm.conversion.linalg import channel_blocks, relative_error
from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.window import window
from tnnlm.errors import UserError
from tnnlm.ops import recurrence
from tnnlm.ops.multirate import MultirateParams
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams


class LayerConversion(NamedTuple):
    """Recurrence of one layer, with the method that produced it and the reason for this method."""

    params: Params
    method: str
    reason: str


class Source(NamedTuple):
    """Convolution to convert: its taps, and properties of its kernel."""

    k: Tensor
    """Taps (E, T), float32 or float64, all of which the recurrence is meant to match."""
    decay: Tensor | None = None
    """Decay per channel, (E,), that ETSC moves into the poles."""
    own: Params | None = None
    """Exact recurrence that the kernel defines, if any, for ``companion``, ``multirate`` and ``auto``."""
    finite: bool = False
    """Whether the kernel is zero from lag T on, even if its last taps are large."""


def convert(source: Source, recipe: ConversionConfig, progress: Progress = silent) -> LayerConversion:
    """Convert taps by ``recipe.method``.

    Args:
        source: Convolution to convert.
        recipe: Method, order, tolerance and further settings. ``recipe.horizon`` is ignored.
        progress: Progress bar for long loops.

    Returns:
        Recurrence with parameters in the dtype of the taps (poles in float64), and its method.

    Raises:
        UserError: If taps or settings are unusable, or the tolerance can't be met.
    """
    k = source.k
    check_taps(k)
    check_recipe(recipe, k.shape[1])
    if recipe.method == "auto":
        return _auto(source, recipe)
    params: Params
    if recipe.method == "companion":
        params = _companion(source.own)
    elif recipe.method == "multirate":
        params = _multirate(source.own)
    elif recipe.method == "etsc":
        params = etsc(k, source.decay)
    elif recipe.method == "window":
        params = window(k)
    elif recipe.method == "balanced":
        params = _balanced(source, recipe, recipe.poles)
    else:
        params = gradient(
            k, order=recipe.order or 16, steps=recipe.gradient_steps, lr=recipe.gradient_lr, progress=progress
        )
    return LayerConversion(params.to_dtype(k.dtype), recipe.method, "as requested")


def check_taps(k: Tensor) -> None:
    """Check that taps have shape (E, T) and are finite.

    Raises:
        UserError: If they don't have two axes, are empty, or contain NaN or infinity.
    """
    if k.dim() != 2 or 0 in k.shape:
        raise UserError(f"taps of shape {tuple(k.shape)}: expected (channels, lags), at least one of each")
    if not all(bool(torch.isfinite(block).all()) for _, block in channel_blocks(k)):
        raise UserError("the taps are not finite, because the training diverged", "use an earlier checkpoint")


def check_recipe(recipe: ConversionConfig, lags: int) -> None:
    """Check the settings of a conversion against their bounds and the number of lags.

    Raises:
        UserError: If a setting is out of range; the message names it.
    """
    check_settings(recipe, lambda name, value: f"{name.replace('_', ' ')} {value}")
    if recipe.order is not None and recipe.order > lags:
        raise UserError(f"order {recipe.order}: must be from 1 to the horizon, {lags}")
    if recipe.window_taps >= lags:
        raise UserError(f"window taps {recipe.window_taps}: must be below the horizon, {lags}")
    if recipe.method == "balanced" and recipe.order is not None and recipe.order <= recipe.window_taps:
        raise UserError(
            f"order {recipe.order}: must be above the number of window taps, {recipe.window_taps}"
        )


def _balanced(source: Source, recipe: ConversionConfig, poles: str) -> SSMParams:
    """Convert by ``balanced``, and check the tolerance again after rounding to the dtype of the taps."""
    k = source.k
    params = balanced(
        k,
        order=recipe.order,
        tolerance=recipe.tolerance,
        poles=poles,
        window_taps=recipe.window_taps,
        finite=source.finite,
    )
    stored = params.to_dtype(k.dtype)
    if recipe.order is None:
        reached = relative_error(k, stored)
        if reached > recipe.tolerance * (1 + 1e-3):
            kept = str(k.dtype).removeprefix("torch.")
            raise UserError(
                f"tolerance {recipe.tolerance:g}: can't be met, order {stored.order()} stored in {kept} has "
                f"a relative error of {reached:.1e}",
                "raise the tolerance, or use --window-taps",
            )
    return stored


def _companion(own: Params | None) -> Params:
    """Return the recurrence that the kernel defines, if it is stable.

    Raises:
        UserError: If the kernel defines none, or it has a pole outside the unit circle.
    """
    if own is None or isinstance(own, MultirateParams):
        raise UserError(
            "method companion: this kernel defines no recurrence", "use --method balanced, auto or window"
        )
    radius = own.largest_pole()
    if radius >= 1:
        raise UserError(
            f"the denominator has a pole of modulus {radius:.5f}, outside the unit circle, so the recurrence "
            "would diverge",
            "use --method window, or train with model.kernel.constraint=montel",
        )
    return own


def _multirate(own: Params | None) -> Params:
    """Return the recurrence of a multi-scale kernel.

    Raises:
        UserError: If the kernel isn't one.
    """
    if not isinstance(own, MultirateParams):
        raise UserError(
            "method multirate: the kernel defines no such recurrence",
            "use --method balanced, auto or window",
        )
    return own


def _auto(source: Source, recipe: ConversionConfig) -> LayerConversion:
    """Return the conversion with the smallest state within the tolerance; multiply-adds break ties."""
    k = source.k
    candidates: dict[str, Params] = {
        "window": window(k).to_dtype(k.dtype),
        "etsc": etsc(k, source.decay).to_dtype(k.dtype),
    }
    failed = ""
    if source.own is not None and not isinstance(source.own, MultirateParams):
        try:
            candidates["companion"] = _companion(source.own).to_dtype(k.dtype)
        except UserError as error:
            failed = f"; companion: {error.reason}"
    for poles in ("shared", "channel"):
        try:
            candidates["balanced"] = _balanced(source, recipe, poles)
            break
        except UserError as error:
            failed += f"; balanced with {poles} poles: {error.reason}"
    cost = {name: (recurrence.state_bytes(p), p.multiply_adds()) for name, p in candidates.items()}
    best = min(cost, key=lambda name: cost[name])
    table = ", ".join(
        f"{name} {size / 1024:,.0f} KiB" for name, (size, _) in sorted(cost.items(), key=lambda i: i[1])
    )
    return LayerConversion(
        candidates[best], best, f"smallest state at tolerance {recipe.tolerance:g}: {table}{failed}"
    )
