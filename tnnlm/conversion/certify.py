"""Certificate of a conversion: its sizes, and its errors measured on the stored parameters, never estimated.

No recurrence of order N has a Hankel-norm error below the (N+1)-st Hankel singular value of the kernel
(Adamyan, Arov, Krein 1971). The Hankel ratio is the measured error over that bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tnnlm.checkpoints.certificate import ConversionReport, ModelReport
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion.horizon import ROUNDING, tail_energy
from tnnlm.conversion.linalg import channel_blocks, compress, hankel_svd
from tnnlm.conversion.methods import LayerConversion
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.modules.hyena import SHORT_TAPS
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams

EXTENT = 4
"""Errors are measured up to this multiple of the horizon."""
LARGEST_RATIO_ORDER = 256
"""No Hankel ratio is computed from this order on, because the singular value would be rounding error."""
KV_CONTEXT = 2048
"""Context length of the Transformer's KV cache that state sizes are compared with, in tokens."""
USELESS_L1 = 0.5
"""Relative l1 error above which a recurrence is wrong past its horizon. Conversions that meet their tolerance
stay far below it."""
_RANK = 128


def horizon_warning(layers: Sequence[ConversionReport], horizon: int) -> str | None:
    """Return a warning if outputs past the horizon are wrong, else None.

    They are if the kernel extends past the horizon, or if the recurrence does and the kernel does not.
    """
    # A companion recurrence is exact at every lag.
    layers = [layer for layer in layers if layer.method != "companion"]
    worst = max((layer.tail_energy for layer in layers), default=0.0)
    if worst > ROUNDING**2:
        return (
            f"the horizon of {horizon} lags omits {worst**0.5:.1e} of the kernel's norm: from position "
            f"{horizon} on outputs will differ from the parallel model's; use --horizon auto"
        )
    beyond = max((layer.l1_error for layer in layers), default=0.0)
    if beyond > USELESS_L1:
        return (
            "this recurrence is not negligible past the horizon, where the kernel is: from position "
            f"{horizon} on outputs may be off by {beyond:.1f} times the largest possible output; "
            "use --method auto or window"
        )
    return None


def measure(
    model: CausalLM, layers: list[LayerConversion], *, method: str, horizon: int, seconds: float
) -> ModelReport:
    """Compare every converted layer with its kernel, and return the report of the model.

    Args:
        model: Trained model, in its parallel form.
        layers: Converted convolutions of the model, in the order of its layers.
        method: Requested method.
        horizon: Horizon of the conversion in lags.
        seconds: Duration of the conversion in seconds.
    """
    reports = []
    for kernel, converted in zip(kernels(model), layers, strict=True):
        with torch.no_grad():
            k = kernel(EXTENT * horizon)
        if bool(torch.isfinite(k).all()):
            reports.append(certify(k, converted, horizon))
        else:  # The kernel grows without bound, for example because of poles outside the unit circle.
            reports.append(replace(certify(k[:, :horizon], converted, horizon), tail_energy=1.0))
    report = _sizes(model.config, horizon)
    report.method, report.layers, report.seconds = method, reports, seconds
    report.state_bytes += sum(layer.state_bytes for layer in reports)
    report.warning = horizon_warning(reports, horizon)
    return report


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


def certify(k: Tensor, converted: LayerConversion, horizon: int) -> ConversionReport:
    """Compare the effective taps of a recurrence with the true ones.

    Args:
        k: True taps (E, T), T >= horizon. Errors are measured at all T lags.
        converted: Recurrence to certify.
        horizon: Number of lags that the recurrence is meant to match.
    """
    params = converted.params
    tiny = torch.finfo(torch.float64).tiny
    # Only the Hankel ratio needs the errors of all channels at once: 16,384 x 16,384 take a gigabyte.
    error = torch.empty_like(k[:, : 2 * horizon]) if _has_ratio(params, k.shape[1]) else None
    squares, l1_error, tail = torch.zeros(2, dtype=torch.float64, device=k.device), 0.0, 0.0
    for part, block in channel_blocks(k):
        difference = block - params.channels_of(part).taps(k.shape[1])
        if error is not None:
            error[part] = difference[:, : 2 * horizon]
        squares += torch.stack([x[:, :horizon].square().sum() for x in (difference, block)])
        l1 = difference.abs().sum(1) / block.abs().sum(1).clamp(min=tiny)
        l1_error = max(l1_error, float(l1.max()))
        tail = max(tail, tail_energy(block, horizon))
    return ConversionReport(
        method=converted.method,
        reason=converted.reason,
        order=params.order(),
        relative_tap_error=float((squares[0] / squares[1].clamp(min=tiny)).sqrt()),
        l1_error=l1_error,
        tail_energy=tail,
        hankel_ratio=None if error is None else _hankel_ratio(k[:, : 2 * horizon], error, params),
        largest_pole=params.largest_pole(),
        state_bytes=recurrence.state_bytes(params),
    )


def _has_ratio(params: Params, lags: int) -> bool:
    if not isinstance(params, SSMParams):
        return False
    return params.poles.dim() == 2 and 0 < params.order() < min(LARGEST_RATIO_ORDER, lags // 2)


def _hankel_ratio(k: Tensor, error: Tensor, params: Params) -> float | None:
    # Only the part of the Hankel matrix that the taps determine, so that nothing is assumed past the last
    # tap. The bound holds for it too: no matrix of rank N comes closer than its (N+1)-st singular value.
    columns = (k.shape[1] + 1) // 2
    sigma = hankel_svd(compress(k, _RANK).unsqueeze(0), params.order() + 1, columns)[0][0]
    leading = compress(error, _RANK, drop=1e-3)
    # Float32 rounding of taps or residues is spread over all channels. A few linear combinations don't
    # capture it, and its singular values say nothing about the kernel.
    total = sum(float(block.square().sum()) for _, block in channel_blocks(error))
    if float(sigma[-1]) < 10 * ROUNDING * float(sigma[0]) or float(leading.square().sum()) < 0.8 * total:
        return None
    # The Hankel norm of the error is its gain from past inputs to future outputs.
    norm = hankel_svd(leading.unsqueeze(0), 1, columns)[0]
    return float(norm.max()) / float(sigma[-1])
