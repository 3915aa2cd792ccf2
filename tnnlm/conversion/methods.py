"""Taps to a recurrence by any method: the one place that knows them all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.config import ConversionConfig
from tnnlm.conversion.balanced import balanced
from tnnlm.conversion.blocks import channel_blocks, channels_of
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.gradient import gradient
from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.window import window
from tnnlm.errors import UserError
from tnnlm.ops import ssm
from tnnlm.ops.ssm import SSMParams

METHODS = ("balanced", "auto", "etsc", "window", "gradient")


class Converted(NamedTuple):
    """A recurrence, the method that made it, and why that one."""

    params: SSMParams
    method: str
    reason: str


def convert(
    k: Tensor, decay: Tensor | None, recipe: ConversionConfig, progress: Progress = silent
) -> Converted:
    """Convert taps by ``recipe.method``.

    Args:
        k: taps (E, T), float32 or float64; all of them count, whatever ``recipe.horizon`` says.
        decay: per-channel decay (E,) that ETSC moves into the poles, or None.
        recipe: method, order, tolerance and the like.
        progress: wraps what takes long, for a bar.

    Returns:
        parameters in the dtype of ``k`` (poles in float64).

    Raises:
        UserError: for unusable taps or settings, and for a tolerance that can't be met.
    """
    check_taps(k)
    check_recipe(recipe, k.shape[1])
    if recipe.method == "auto":
        return _auto(k, decay, recipe)
    if recipe.method == "etsc":
        params = etsc(k, decay)
    elif recipe.method == "window":
        params = window(k)
    elif recipe.method == "balanced":
        return Converted(_balanced(k, recipe, recipe.poles), recipe.method, "as asked")
    else:
        params = gradient(
            k, order=recipe.order or 16, steps=recipe.gradient_steps, lr=recipe.gradient_lr, progress=progress
        )
    return Converted(ssm.to_dtype(params, k.dtype), recipe.method, "as asked")


def check_taps(k: Tensor) -> None:
    """Refuse taps that no method can use.

    Raises:
        UserError: naming what is wrong.
    """
    if k.dim() != 2 or 0 in k.shape:
        raise UserError(f"taps of shape {tuple(k.shape)}: expected (channels, lags), at least one of each")
    if not all(bool(torch.isfinite(block).all()) for _, block in channel_blocks(k)):
        raise UserError("the taps are not finite: the training diverged, take an earlier checkpoint")


def check_recipe(recipe: ConversionConfig, lags: int) -> None:
    """Refuse settings that no taps can be converted with.

    Raises:
        UserError: naming the setting.
    """
    if recipe.method not in METHODS:
        raise UserError(f"unknown conversion method {recipe.method!r}; there is {', '.join(METHODS)}")
    if recipe.poles not in ("shared", "channel"):
        raise UserError(f"poles {recipe.poles!r}: must be shared or channel")
    if recipe.order is not None and not 1 <= recipe.order <= lags:
        raise UserError(f"order {recipe.order}: must be from 1 to the horizon, {lags}")
    if not 0 <= recipe.window_taps < lags:
        raise UserError(f"window taps {recipe.window_taps}: must be from 0 to below the horizon, {lags}")
    if recipe.method == "balanced" and recipe.order is not None and recipe.order <= recipe.window_taps:
        raise UserError(f"order {recipe.order}: must be above the {recipe.window_taps} window taps it counts")
    if not 0 < recipe.tolerance < 1:
        raise UserError(f"tolerance {recipe.tolerance:g}: must be above 0 and below 1")


def _balanced(k: Tensor, recipe: ConversionConfig, poles: str) -> SSMParams:
    """Balanced, and measured once more as it is stored: float32 can't hold every tolerance."""
    params = balanced(
        k, order=recipe.order, tolerance=recipe.tolerance, poles=poles, window_taps=recipe.window_taps
    )
    stored = ssm.to_dtype(params, k.dtype)
    if recipe.order is None:
        reached = relative_error(k, stored)
        if reached > recipe.tolerance * (1 + 1e-3):
            kept = str(k.dtype).removeprefix("torch.")
            raise UserError(
                f"tolerance {recipe.tolerance:g} can't be met: stored in {kept}, order "
                f"{ssm.order(stored)} leaves a relative error of {reached:.1e}; raise the tolerance, "
                "or give window taps"
            )
    return stored


def relative_error(k: Tensor, params: SSMParams) -> float:
    """||k - k^|| / ||k|| of the stored numbers, on the lags of k (E, T)."""
    squares = torch.zeros(2, dtype=torch.float64, device=k.device)
    for part, block in channel_blocks(k):
        difference = block - ssm.taps(channels_of(params, part), k.shape[1])
        squares += torch.stack([x.square().sum() for x in (difference, block)])
    return float((squares[0] / squares[1].clamp(min=torch.finfo(torch.float64).tiny)).sqrt())


def _auto(k: Tensor, decay: Tensor | None, recipe: ConversionConfig) -> Converted:
    """The cheapest that meets the tolerance: fewest state bytes, then multiply-adds per token."""
    exact = {"window": ssm.to_dtype(window(k), k.dtype), "etsc": ssm.to_dtype(etsc(k, decay), k.dtype)}
    candidates = dict(exact)
    failed = ""
    for poles in ("shared", "channel"):
        try:
            candidates["balanced"] = _balanced(k, recipe, poles)
        except UserError as error:
            failed = f"; balanced with {poles} poles: {str(error).split(';')[0]}{failed}"
            continue
        break
    cost = {name: (ssm.state_bytes(params), ssm.multiply_adds(params)) for name, params in candidates.items()}
    best = min(cost, key=lambda name: cost[name])
    table = ", ".join(
        f"{name} {size / 1024:,.0f} KiB" for name, (size, _) in sorted(cost.items(), key=lambda i: i[1])
    )
    return Converted(
        candidates[best], best, f"smallest state at tolerance {recipe.tolerance:g}: {table}{failed}"
    )
