"""Certificate of a conversion: its sizes, and its errors measured on the stored parameters, never estimated.

No recurrence of order N has a Hankel-norm error below the (N+1)-st Hankel singular value of the kernel
(Adamyan, Arov, Krein 1971). The Hankel ratio is the measured error over that bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tnnlm.checkpoints.certificate import ConversionReport, ModelReport
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion.companion import OWN_METHODS
from tnnlm.conversion.horizon import ROUNDING, tail_energy
from tnnlm.conversion.linalg import (
    channel_blocks,
    compress,
    hankel_singular_values,
    power_of_two,
)
from tnnlm.conversion.progress import Progress, silent
from tnnlm.conversion.source import LayerConversion, moved
from tnnlm.conversion.tails import kernel_tail, recurrence_tail
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.modules.hyena import SHORT_TAPS
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params, to_device
from tnnlm.ops.ssm import SSMParams

EXTENT = 8
"""Errors are measured up to this multiple of the horizon or of the training length, whichever is longer, and
at least up to the end of a finite kernel."""
LARGEST_RATIO_ORDER = 256
"""No Hankel ratio is computed from this order on, because the singular value would be rounding error."""
KV_CONTEXT = 2048
"""Context length of the Transformer's KV cache that state sizes are compared with, in tokens."""
USELESS_L1 = 0.5
"""Relative l1 error above which a recurrence is wrong past its horizon. Conversions that meet their tolerance
stay far below it."""
RATIO_SLACK = 0.02
"""Largest amount by which a measured Hankel ratio may be below 1, which then counts as 1: the norm of the
error is that of most of its linear combinations and, for long horizons, of a random subspace."""
_RANK = 128


def horizon_warning(layers: Sequence[ConversionReport], horizon: int) -> str | None:
    """Return a warning if outputs past the horizon are wrong, else None.

    They are if the kernel extends past the horizon, or if the recurrence does and the kernel does not.
    """
    # A recurrence that the kernel defines is exact at every lag.
    layers = [layer for layer in layers if layer.method not in OWN_METHODS]
    worst = max((layer.tail_energy for layer in layers), default=0.0)
    if worst > ROUNDING**2:
        return (
            f"the horizon of {horizon} lags omits {worst**0.5:.1e} of the kernel's norm: from position "
            f"{horizon} on outputs will differ from the parallel model's; use --horizon auto"
        )
    beyond = max((layer.l1_error for layer in layers), default=0.0)
    if beyond > USELESS_L1:
        bound = f"by {beyond:.1f} times the largest possible output" if beyond < math.inf else "without bound"
        return (
            "this recurrence is not negligible past the horizon, where the kernel is: from position "
            f"{horizon} on outputs may be off {bound}; use --method auto or window"
        )
    return None


@torch.no_grad()
def measure(
    model: CausalLM,
    layers: list[LayerConversion],
    *,
    method: str,
    horizon: int,
    seconds: float,
    progress: Progress = silent,
    device: torch.device | None = None,
) -> ModelReport:
    """Compare every converted layer with its kernel, and return the report of the model.

    Args:
        model: Trained model, in its parallel form.
        layers: Converted convolutions of the model, in the order of its layers.
        method: Requested method.
        horizon: Horizon of the conversion in lags.
        seconds: Duration of the conversion in seconds.
        progress: Progress bar for the loop over the layers.
        device: Device to which each layer is copied while it is measured; None measures it where it is.
    """
    length = model.config.max_length
    pairs = list(zip(kernels(model), layers, strict=True))
    reports = []
    for kernel, converted in progress(pairs, "measuring layers"):
        if device is not None:
            converted = converted._replace(params=to_device(converted.params, device))
        reports.append(certify_kernel(moved(kernel, device), converted, horizon, length))
    report = _sizes(model.config, horizon)
    report.method, report.layers, report.seconds = method, reports, seconds
    report.state_bytes += sum(layer.state_bytes for layer in reports)
    report.warning = horizon_warning(reports, horizon)
    return report


@torch.no_grad()
def certify_kernel(
    kernel: Kernel, converted: LayerConversion, horizon: int, max_length: int
) -> ConversionReport:
    """Compare a recurrence with its kernel over ``EXTENT`` horizons or training lengths, and bound the rest.

    Args:
        kernel: Trained kernel.
        converted: Recurrence of the kernel.
        horizon: Number of lags that the recurrence is meant to match.
        max_length: Training length in steps.
    """
    own = kernel.recurrence()
    k = kernel(max(EXTENT * max(horizon, max_length), kernel.support or 0))
    if not bool(torch.isfinite(k).all()):
        # The kernel grows without bound, for example because of poles outside the unit circle.
        found = certify(k[:, :horizon], converted, horizon)
        return replace(found, tail_energy=1.0, l1_error=math.inf)
    # A recurrence that the kernel defines is exact at every lag.
    same = own is not None and _equal(own.to_dtype(k.dtype), converted.params)
    return certify(k, converted, horizon, tail=None if same else kernel_tail(kernel, k, own))


def _equal(a: Params, b: Params) -> bool:
    return type(a) is type(b) and all(map(torch.equal, a, b))


def describe(converted: CausalLM) -> ModelReport:
    """Return the report of a converted model whose trained model is not available: sizes and a warning.

    The horizon is the training length, because the accuracy past it is unknown.
    """
    length = converted.config.max_length
    report = _sizes(converted.config, length)
    report.state_bytes += sum(recurrence.state_bytes(params) for params in recurrences(converted))
    report.warning = (
        "errors were not measured, because the model was converted before it was saved: past the training "
        f"length of {length} tokens, outputs may differ from the trained model's"
    )
    return report


def _sizes(config: ModelConfig, horizon: int) -> ModelReport:
    """Return a report that holds only the sizes that follow from the configuration."""
    channels = config.n_layers * config.expand * config.d_model
    # The short convolutions of Hyena operators have a state too.
    short = 4 * 3 * channels * (SHORT_TAPS - 1) if config.block == "hyena" else 0
    published = 2 * ((config.max_length + 1) // 2)
    return ModelReport(
        method="unknown",
        horizon=horizon,
        layers=[],
        state_bytes=short,
        etsc_state_bytes=4 * channels * published + short,
        window_state_bytes=4 * channels * (horizon - 1) + short,
        kv_cache_bytes=4 * 2 * config.n_layers * config.d_model * KV_CONTEXT,
        seconds=0.0,
    )


def certify(
    k: Tensor, converted: LayerConversion, horizon: int, *, tail: Tensor | None = None, reach: int = 0
) -> ConversionReport:
    """Compare the effective taps of a recurrence with the true ones.

    Args:
        k: True taps (E, T), T >= horizon. Errors are measured at all T lags.
        converted: Recurrence to certify.
        horizon: Number of lags that the recurrence is meant to match.
        tail: Upper bounds (E,) of the l1 norm of the kernel past the last measured lag, zero if it is finite.
            None if they are unknown; the l1 error then counts the measured lags only.
        reach: Number of lags to measure, with zeros from lag T on; T if it is smaller.
    """
    params, reach = converted.params, max(reach, k.shape[1])
    scale = power_of_two(k)
    # Only the Hankel ratio needs the errors of all channels at once: 16,384 x 16,384 take a gigabyte.
    known = min(k.shape[1], 2 * horizon)
    error = torch.empty_like(k[:, :known]) if _has_ratio(params, known) else None
    squares, tail_share = torch.zeros(2, dtype=torch.float64, device=k.device), 0.0
    l1 = torch.zeros(2, len(k), dtype=torch.float64, device=k.device)
    for part, block in channel_blocks(k):
        whole = torch.nn.functional.pad(block, (0, reach - k.shape[1]))
        difference, whole = params.channels_of(part).difference(whole) / scale, whole / scale
        if error is not None:
            error[part] = difference[:, :known]
        squares += torch.stack([x[:, :horizon].square().sum() for x in (difference, whole)])
        l1[:, part] = torch.stack([x.abs().sum(1) for x in (difference, whole)])
        tail_share = max(tail_share, tail_energy(block, horizon))
    if tail is not None:
        l1[0] += (tail + recurrence_tail(params, reach)) / scale
    return ConversionReport(
        method=converted.method,
        reason=converted.reason,
        order=params.order(),
        relative_tap_error=float(_quotient(squares[0], squares[1]).sqrt()),
        l1_error=float(_quotient(l1[0], l1[1].where(l1[1] > 0, l1[1].amax())).amax()),
        tail_energy=tail_share,
        hankel_ratio=None if error is None else _hankel_ratio(k[:, :known] / scale, error, params),
        largest_pole=params.largest_pole(),
        state_bytes=recurrence.state_bytes(params),
    )


def _quotient(error: Tensor, size: Tensor) -> Tensor:
    """Return error / size: 0 where the error is 0, infinity where only the size is or where it overflowed."""
    found = torch.where(error == 0, 0.0, error / size)
    return found.where(torch.isfinite(found), torch.full_like(found, torch.inf))


def _has_ratio(params: Params, lags: int) -> bool:
    if not isinstance(params, SSMParams) or params.poles.dim() != 2:
        return False
    # With as many states as columns of the Hankel matrix, the bound is zero.
    return 0 < params.order() < min(LARGEST_RATIO_ORDER, (lags + 1) // 2)


def _hankel_ratio(k: Tensor, error: Tensor, params: Params) -> float | None:
    """Return the Hankel norm of the error over its lower bound, None if rounding errors dominate either.

    Raises:
        ArithmeticError: If the measured ratio is below 1 by more than ``RATIO_SLACK``, which is impossible.
    """
    # Only the part of the Hankel matrix that the taps determine, so that nothing is assumed past the last
    # tap. The bound holds for it too: no matrix of rank N comes closer than its (N+1)-st singular value.
    columns, order = (k.shape[1] + 1) // 2, params.order()
    sigma = hankel_singular_values(compress(k, _RANK), order + 1, columns)
    leading = compress(error, _RANK, drop=1e-3)
    # Float32 rounding of taps or residues is spread over all channels. A few linear combinations don't
    # capture it, and its singular values say nothing about the kernel.
    total = sum(float(block.square().sum()) for _, block in channel_blocks(error))
    captured = float(leading.square().sum())
    bound, rounding = float(sigma[-1]), 10 * ROUNDING * float(sigma[0])
    if not math.isfinite(total) or bound <= rounding or captured < 0.8 * total:
        return None
    # The Hankel norm of the error is its gain from past inputs to future outputs.
    ratio = float(hankel_singular_values(leading, 1, columns)[0]) / bound
    if ratio < 1 - RATIO_SLACK:
        if captured < 0.99 * total:
            return None
        raise ArithmeticError(f"Hankel ratio {ratio:.4f} of order {order}: below its lower bound of 1")
    return max(ratio, 1.0)
