"""Checks of the settings of a conversion, also before the training whose checkpoints it converts."""

from __future__ import annotations

import torch

from tnnlm.config.checks import check_settings
from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion.companion import OWN_METHODS, check_kernel
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.errors import UserError
from tnnlm.kernels import build_kernel


def check_training(config: Config) -> None:
    """Check, before a training, the settings of the conversions of its checkpoints against the kernel.

    A horizon that follows from the kernel is that of the initial one.

    Raises:
        UserError: If ``conversion.method`` needs a recurrence that the kernel doesn't define, if
            ``conversion.order`` or ``conversion.window_taps`` doesn't fit the horizon, or if the kernel can't
            be built.
    """
    recipe, model = config.conversion, config.model
    own = recipe.method in OWN_METHODS
    if config.task != "causal" or not (own or recipe.order is not None or recipe.window_taps):
        return
    with torch.random.fork_rng(devices=[]):
        kernel = build_kernel(model.kernel, model.expand * model.d_model, model.max_length)
    if own:
        place, remedy = f"conversion.method={recipe.method}", "use conversion.method=auto or window"
        check_kernel(kernel, model.kernel.name, recipe.method, place, remedy)
        return
    lags = auto_horizon(kernel, model.max_length) if recipe.horizon == "auto" else int(recipe.horizon)
    try:
        check_recipe(recipe, lags or model.max_length)
    except UserError as error:
        raise UserError(
            f"conversion: {error.reason}",
            "change conversion.order, conversion.window_taps or conversion.horizon",
        ) from None


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
