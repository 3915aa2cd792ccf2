"""What a conversion costs and how far it is off: measured on the stored numbers, never estimated."""

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
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams

EXTENT = 4
"""errors past the horizon are looked for up to so many horizons"""
LARGEST_RATIO_ORDER = 256
"""above this order no Hankel ratio is worked out: the singular value would be rounding"""
KV_CONTEXT = 2048
"""tokens of the Transformer's cache that state sizes are compared with"""
USELESS_L1 = 0.5
"""L1 error that no conversion within its tolerance comes near, and one that is wrong past its horizon does"""
_RANK = 128


def horizon_warning(layers: Sequence[ConversionReport], horizon: int) -> str | None:
    """In words, what is wrong past the horizon: the kernel goes on there, or the recurrence does where
    the kernel is over. None if neither matters."""
    # A kernel's own recurrence knows of no horizon.
    layers = [layer for layer in layers if layer.method != "companion"]
    worst = max((layer.tail_energy for layer in layers), default=0.0)
    if worst > ROUNDING**2:
        return (
            f"the horizon of {horizon} leaves {worst**0.5:.1e} of the kernel's norm outside: from "
            f"lag {horizon} on outputs will differ from the parallel model's; use --horizon auto"
        )
    beyond = max((layer.l1_error for layer in layers), default=0.0)
    if beyond > USELESS_L1:
        return (
            f"from lag {horizon} on, where the kernel is over, this recurrence goes on: outputs may "
            f"be off by {beyond:.1f} times the largest there can be; use --method auto or window"
        )
    return None


def measure(
    model: CausalLM, layers: list[LayerConversion], *, method: str, horizon: int, seconds: float
) -> ModelReport:
    """Compare every converted layer with the kernel it came from.

    Args:
        model: the trained model, in its parallel form.
        layers: its converted convolutions.
        method, horizon, seconds: how they were asked for, and how long that took.
    """
    reports = []
    for kernel, converted in zip(kernels(model), layers, strict=True):
        with torch.no_grad():
            k = kernel(EXTENT * horizon)
        if bool(torch.isfinite(k).all()):
            reports.append(certify(k, converted, horizon))
        else:  # a kernel that grows without bound, as one with poles outside the unit circle
            reports.append(replace(certify(k[:, :horizon], converted, horizon), tail_energy=1.0))
    report = _sizes(model.config, horizon)
    report.method, report.layers, report.seconds = method, reports, seconds
    report.state_bytes = sum(layer.state_bytes for layer in reports)
    report.warning = horizon_warning(reports, horizon)
    return report


def describe(converted: CausalLM) -> ModelReport:
    """The report of a converted model whose trained form is not at hand: its sizes, and that no error was
    measured. What is right beyond the training length is unknown, so that stands for the horizon."""
    length = converted.config.max_length
    report = _sizes(converted.config, length)
    report.state_bytes = sum(recurrence.state_bytes(params) for params in recurrences(converted))
    report.warning = (
        f"errors were not measured, because the model was saved in its converted form: past {length} tokens, "
        "the training length, outputs may differ from the trained model's"
    )
    return report


def _sizes(config: ModelConfig, horizon: int) -> ModelReport:
    """A report with nothing in it but what the configuration says."""
    channels = config.n_layers * config.expand * config.d_model
    published = 2 * ((config.max_length + 1) // 2)
    return ModelReport(
        method="unknown",
        horizon=horizon,
        layers=[],
        state_bytes=0,
        etsc_state_bytes=4 * channels * published,
        window_state_bytes=4 * channels * (horizon - 1),
        kv_cache_bytes=4 * 2 * config.n_layers * config.d_model * KV_CONTEXT,
        seconds=0.0,
    )


def certify(k: Tensor, converted: LayerConversion, horizon: int) -> ConversionReport:
    """Compare the effective taps of a recurrence with the true ones.

    Args:
        k: true taps (E, T), as far as errors are to be looked for; T >= horizon.
        converted: the recurrence.
        horizon: lags that it was made for.
    """
    params = converted.params
    tiny = torch.finfo(torch.float64).tiny
    # The errors themselves are kept only for the ratio: 16,384 x 16,384 of them take a gigabyte.
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
    # The half of the Hankel matrix that the taps determine: nothing is assumed past the last one,
    # and no matrix of rank N comes closer than the (N+1)-st singular value of that half either.
    columns = (k.shape[1] + 1) // 2
    sigma = hankel_svd(compress(k, _RANK).unsqueeze(0), params.order() + 1, columns)[0][0]
    leading = compress(error, _RANK, drop=1e-3)
    # Float32 rounding, of the taps or of the residues, is spread over all channels: no few
    # combinations hold it, and its singular values say nothing about the kernel.
    total = sum(float(block.square().sum()) for _, block in channel_blocks(error))
    if float(sigma[-1]) < 10 * ROUNDING * float(sigma[0]) or float(leading.square().sum()) < 0.8 * total:
        return None
    # Its norm is the gain from past inputs to future outputs.
    norm = hankel_svd(leading.unsqueeze(0), 1, columns)[0]
    return float(norm.max()) / float(sigma[-1])
