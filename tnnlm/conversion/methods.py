"""Conversion of taps to a recurrence by any method."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.auto import Attempt, choose
from tnnlm.conversion.balanced import balanced
from tnnlm.conversion.checks import check_recipe
from tnnlm.conversion.companion import OTHERS, OWN_METHODS, companion
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.gradient import gradient
from tnnlm.conversion.linalg import channel_blocks, power_of_two
from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.source import (
    CLOSER,
    LayerConversion,
    Source,
    ToleranceError,
    largest_error,
    sampled,
)
from tnnlm.conversion.window import window
from tnnlm.errors import UserError
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams

_MARGINS = (1.0, 0.5, 0.25)
"""Shares of the tolerance that ``balanced`` tries until the stored parameters meet the tolerance itself:
rounding them to float32 adds an error, and so do lags past the horizon."""


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
    check_taps(source.k)
    check_decay(source)
    check_recipe(recipe, source.k.shape[1])
    if recipe.method == "auto":
        return choose(source, recipe.tolerance, _attempts(source, recipe), progress)
    params: Params
    if recipe.method in OWN_METHODS:
        params = _own(source, recipe.method)
    else:
        params = _from_taps(recipe.method, source, recipe, progress=progress)
    return LayerConversion(params, recipe.method, "as requested")


def _attempts(source: Source, recipe: ConversionConfig) -> list[Attempt]:
    """Return the conversions that ``auto`` tries, on taps without the zeros at the end of a finite kernel."""
    nonzero = int((source.k != 0).any(0).nonzero().amax()) + 1 if bool(source.k.any()) else 1
    short = source._replace(k=source.k[:, : max(nonzero, recipe.window_taps + 1)])
    reduced = short if source.finite else source

    def attempt(method: str, taps: Source, poles: str = "shared", label: str = "") -> Attempt:
        def run(limit: int | None) -> Params:
            return _from_taps(method, taps, recipe, poles=poles, limit=limit)

        return Attempt(method, label or method, run)

    found = [attempt("window", short), attempt("etsc", reduced)]
    if source.own is not None:
        name = source.own.METHOD
        found.append(Attempt(name, name, lambda _: _own(source, name)))
    few = sampled(reduced)
    for poles in ("shared", "channel"):
        made = attempt("balanced", reduced, poles, f"balanced with {poles} poles")
        sample = attempt("balanced", few, poles).run
        found.append(made._replace(sample=sample, window=recipe.window_taps))
    return found


def _own(source: Source, method: str) -> Params:
    """Return a copy of the recurrence that the kernel defines, in the dtype of the taps.

    Raises:
        UserError: If it defines none of that method, or one whose steps are inaccurate.
    """
    own = source.own
    if method == "companion":
        return companion(own).to_dtype(source.k.dtype)
    if own is None or method != own.METHOD:
        raise UserError(f"method {method}: the kernel defines no such recurrence", OTHERS)
    copy = type(own)(*(part.detach().clone() for part in own))
    return copy.to_dtype(source.k.dtype)


def _from_taps(
    method: str,
    source: Source,
    recipe: ConversionConfig,
    *,
    poles: str | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> SSMParams:
    """Return the recurrence that a method computes from taps, in the dtype in which it is stored.

    Taps far from 1 are divided by a power of two and the recurrence is multiplied by it, both exactly, so
    that no intermediate square overflows or underflows.

    Raises:
        UserError: If the taps or the parameters are outside the range of their dtype, or ``balanced`` can't
            meet the tolerance.
    """
    whole, dtype = source, source.k.dtype
    scale = power_of_two(source.k)
    if scale != 1:
        longer = None if source.longer is None else source.longer / scale
        source = source._replace(k=source.k / scale, longer=longer)
    try:
        if method == "balanced":
            params = _balanced(source, recipe, poles or recipe.poles, limit)
        else:
            params = _solve(method, source, recipe, progress)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise UserError(
            f"method {method}: the decomposition of these taps failed, because their state matrix has no "
            "complete set of eigenvectors",
            "use --method auto or window",
        ) from None
    params = params._replace(window=params.window * scale, residues=params.residues * scale).to_dtype(dtype)
    kept = str(dtype).removeprefix("torch.")
    if not all(bool(torch.isfinite(part).all()) for part in params):
        raise UserError(f"method {method}: the parameters exceed the range of {kept}", "scale the taps down")
    largest = float(whole.k.abs().amax())
    if method != "window" and 0 < largest < torch.finfo(dtype).tiny / torch.finfo(dtype).eps:
        raise UserError(
            f"method {method}: the largest tap, {largest:.1e}, is too small for parameters in {kept}",
            "scale the taps up, or use --method window",
        )
    return params


def _solve(method: str, source: Source, recipe: ConversionConfig, progress: Progress) -> SSMParams:
    if method == "etsc":
        return etsc(source.k, source.decay)
    if method == "window":
        return window(source.k)
    order = recipe.order or 16
    steps, lr = recipe.gradient_steps, recipe.gradient_lr
    return gradient(source.k, order=order, steps=steps, lr=lr, progress=progress)


def check_taps(k: Tensor) -> None:
    """Check that taps have shape (E, T) and are finite.

    Raises:
        UserError: If they don't have two axes, are empty, or contain NaN or infinity.
    """
    if k.dim() != 2 or 0 in k.shape:
        raise UserError(f"taps of shape {tuple(k.shape)}: expected (channels, lags), at least one of each")
    if not all(bool(torch.isfinite(block).all()) for _, block in channel_blocks(k)):
        raise UserError("the taps are not finite, because the training diverged", "use an earlier checkpoint")


def check_decay(source: Source) -> None:
    """Check the decays of a convolution, if it has any.

    Raises:
        UserError: If there isn't one per channel, or one is not above 0 and at most 1.
    """
    decay, channels = source.decay, len(source.k)
    if decay is None:
        return
    if decay.shape != (channels,):
        raise UserError(f"decay of shape {tuple(decay.shape)}: expected one value per channel, {channels}")
    if decay.is_complex() or not bool(((decay > 0) & (decay <= 1)).all()):
        raise UserError("decay: must be above 0 and at most 1")


def _balanced(source: Source, recipe: ConversionConfig, poles: str, limit: int | None = None) -> SSMParams:
    """Convert by ``balanced`` with an error that meets the tolerance as stored, in the dtype of the taps.

    Orders above ``limit`` are not tried, unless the recipe sets one.

    Raises:
        ToleranceError: If it can't; the message states the smallest error with its order.
    """
    k, tolerance, each = source.k, recipe.tolerance, poles == "channel"

    def stored(order: int | None, tolerance: float) -> tuple[SSMParams, float, int]:
        params = balanced(
            k,
            order=order,
            tolerance=tolerance,
            poles=poles,
            window_taps=recipe.window_taps,
            finite=source.finite,
            max_order=limit,
        ).to_dtype(k.dtype)
        return params, *largest_error(source, params, each=each)

    tried: list[tuple[float, int, int]] = []
    for share in _MARGINS:
        try:
            params, reached, lags = stored(recipe.order, tolerance * share)
        except ToleranceError:
            if not tried:
                raise
            break
        if recipe.order is not None or reached <= tolerance:
            return params
        tried.append((reached, params.order(), lags))
    # Rounding can ruin a large order, whose residues cancel each other, so smaller ones are measured too.
    order = min(tried)[1]
    while order > recipe.window_taps + 1:
        order = max(order // 2, recipe.window_taps + 1)
        params, reached, lags = stored(order, tolerance)
        best = min(tried)[0]
        tried.append((reached, params.order(), lags))
        if best <= reached and best < 1:
            break
    reached, order, lags = min(tried)
    raise ToleranceError(
        f"tolerance {tolerance:g}: can't be met, order {order} stored in "
        f"{str(k.dtype).removeprefix('torch.')} has a relative error of {reached:.1e} over {lags} lags",
        CLOSER,
        reached,
    )
