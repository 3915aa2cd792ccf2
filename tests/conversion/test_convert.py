"""Conversion of whole models (invariants 2 to 4 and 8 of CONTRIBUTING.md), horizons, and reports."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from tests.support.converted import measure_model, model_horizon
from tests.support.models import FAMILIES, run_steps, tiny_config
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import (
    auto_horizon,
    convert_layers,
    convert_model,
    measure,
)
from tnnlm.conversion.horizon import MAX_HORIZON
from tnnlm.conversion.verify import check_gap, check_layers, check_steps
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel, TNOConfig, build_kernel
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.modules import RecurrentConv

LENGTH = 40
EXACT = ("etsc", "window")


@pytest.mark.parametrize("method", EXACT)
def test_step_matches_forward_in_float32(method: str) -> None:
    model = CausalLM(tiny_config(d_model=32)).eval()
    converted = convert_model(model, method=method, horizon=64)
    tokens = torch.randint(300, (2, 64))
    stepped, _ = run_steps(converted, tokens, converted.init_state(2))
    torch.testing.assert_close(stepped, model(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_balanced_meets_its_tolerance_at_the_horizon_and_at_8_times_the_training_length(
    tolerance: float,
) -> None:
    model = CausalLM(tiny_config(max_length=256)).eval()
    horizon = model_horizon(model)
    converted = convert_model(model, method="balanced", tolerance=tolerance)
    for kernel, params in zip(kernels(model), recurrences(converted), strict=True):
        for length in (horizon, 8 * 256):
            with torch.no_grad():
                k = kernel(length).double()
            assert (params.taps(length) - k).norm() <= 1.02 * tolerance * k.norm()
        assert params.largest_pole() < 1
        assert params.order() <= 64


def test_prefill_keeps_only_the_last_logits(tiny_model: CausalLM) -> None:
    converted = convert_model(tiny_model, horizon=LENGTH)
    tokens = torch.randint(300, (2, 9))
    every, _ = converted.prefill(tokens, converted.init_state(2))
    last, _ = converted.prefill(tokens, converted.init_state(2), keep=1)
    torch.testing.assert_close(last, every[:, -1:])


def test_autocast_leaves_the_recurrence_in_float32() -> None:
    converted = convert_model(CausalLM(tiny_config()).eval(), horizon=LENGTH)
    conv = converted.blocks[0].mixer.conv
    x = torch.randn(1, 20, 48).bfloat16()
    expected = conv(x.float()).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
        _, state = conv.step(x[:, 0], conv.init_state(1))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    assert state.real.dtype == torch.float32


def test_convert_model_leaves_the_trained_one_alone(tiny_model: CausalLM) -> None:
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    converted = convert_model(tiny_model, horizon=LENGTH)
    converted.embedding.weight.zero_()
    assert all(torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())
    assert not any(isinstance(module, RecurrentConv) for module in tiny_model.modules())
    assert not any(isinstance(module, Kernel) for module in converted.modules())
    shared = set(converted.state_dict()) & set(tiny_model.state_dict())
    assert shared == {key for key in tiny_model.state_dict() if ".conv." not in key}


def test_unconverted_model_has_no_recurrence_and_says_what_to_do(tiny_model: CausalLM) -> None:
    with pytest.raises(UserError, match=r"convert\.py"):
        tiny_model.init_state(1)
    with pytest.raises(UserError, match=r"convert\.py"):
        tiny_model.step(torch.zeros(1, dtype=torch.long), ModelState((None,) * 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="already"):
        convert_model(convert_model(tiny_model, horizon=4))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_auto_horizon_is_the_smallest_with_rounding_left(decay: float) -> None:
    model = CausalLM(tiny_config(kernel=TNOConfig(decay=decay, rpe_dim=8, rpe_layers=1)))
    kernel = model.blocks[0].mixer.conv.kernel
    horizon = auto_horizon(kernel, 32)
    assert horizon is not None
    with torch.no_grad():
        energy = kernel(8 * horizon).double().square()
    left = [float((energy[:, n:].sum(1) / energy.sum(1)).max()) for n in (horizon - 1, horizon)]
    rounding = torch.finfo(torch.float32).eps ** 2
    assert left[1] <= rounding < left[0]


@pytest.mark.parametrize(("lags", "found"), [(12_000, True), (20_000, False)])
def test_auto_horizon_never_exceeds_its_maximum(lags: int, found: bool) -> None:
    rounding = torch.finfo(torch.float32).eps
    kernel = build_kernel(TNOConfig(decay=rounding ** (1 / lags), rpe_dim=2, rpe_layers=0), 1, 64)
    nn.init.zeros_(kernel.rpe.output.weight)
    nn.init.ones_(kernel.rpe.output.bias)
    for start in (64, 1000):  # 1000 doubles to 32,000 and 64,000, past twice the maximum
        horizon = auto_horizon(kernel, start)
        assert (horizon is not None) == found
        assert horizon is None or horizon <= MAX_HORIZON


def test_horizon_of_a_kernel_without_decay_is_the_training_length() -> None:
    model = CausalLM(tiny_config(kernel=TNOConfig(decay=1.0, rpe_dim=8, rpe_layers=1)))
    assert auto_horizon(model.blocks[0].mixer.conv.kernel, 32) is None
    assert model_horizon(model) == 32


def test_report_measures_what_was_stored() -> None:
    model = CausalLM(tiny_config()).eval()
    horizon = model_horizon(model)
    converted = convert_model(model, horizon=horizon)
    report = measure_model(model, converted, method="etsc", horizon=horizon)
    assert report.warning is None
    for layer in report.layers:
        assert layer.order == horizon
        assert 0 < layer.relative_tap_error < 5e-6
        assert 0 < layer.l1_error < 1e-4
    assert report.state_bytes == sum(
        part.numel() * part.element_size() for part in converted.init_state(1).tensors
    )
    converted.blocks[0].mixer.conv.residues.mul_(1.01)
    worse = measure_model(model, converted, method="etsc", horizon=horizon)
    assert worse.layers[0].relative_tap_error == pytest.approx(0.01, rel=1e-3)


def test_report_of_a_short_horizon_states_the_position() -> None:
    model = CausalLM(tiny_config()).eval()
    converted = convert_model(model, horizon=20)
    report = measure_model(model, converted, method="etsc", horizon=20)
    assert report.layers[0].l1_error > 0.1
    assert report.warning is not None
    assert "from position 20 on outputs will differ" in report.warning


def test_report_warns_of_a_recurrence_past_a_finite_kernel() -> None:
    # Without decay, the modes of ETSC never decay: past the horizon they repeat the finite kernel.
    model = CausalLM(tiny_config(kernel=FAMILIES["sgconv"]())).eval()
    told = {}
    for method in ("etsc", "window"):
        horizon, layers = convert_layers(model, ConversionConfig(method=method))
        report = measure(model, layers, method=method, horizon=horizon, seconds=0.0)
        told[method] = report.warning
        # JSON has no infinity.
        stored = json.loads(report.to_json())["layers"][0]["l1_error"]
        assert stored == (None if method == "etsc" else 0.0)
    assert told["window"] is None
    assert told["etsc"] is not None
    assert "this recurrence is not negligible past the horizon" in told["etsc"]
    assert "without bound" in told["etsc"]


def test_verify_notices_a_damaged_recurrence() -> None:
    model = CausalLM(tiny_config()).eval()
    converted = convert_model(model, horizon=64)
    tokens = torch.randint(300, (1, 32))
    assert check_layers(model, converted).passed
    assert check_steps(model, converted, tokens).passed
    converted.blocks[1].mixer.conv.poles.mul_(0.9)
    assert not check_layers(model, converted).passed
    assert not check_steps(model, converted, tokens).passed
    assert check_gap(-9e-5).passed
    assert not check_gap(2e-4).passed
    assert not check_gap(math.nan).passed


def test_diverged_kernel_is_reported() -> None:
    model = CausalLM(tiny_config())
    nn.init.constant_(model.blocks[0].mixer.conv.kernel.rpe.output.bias, math.nan)
    with pytest.raises(UserError, match="not finite"):
        convert_model(model, horizon=8)


def test_decays_that_are_trained_are_measured_without_gradients() -> None:
    model = CausalLM(tiny_config()).eval()
    for kernel in kernels(model):
        kernel._buffers.pop("decays")
        kernel.decays = nn.Parameter(torch.full((kernel.n_channels,), 0.99))
    converted = convert_model(model, method="etsc", horizon=40)
    report = measure_model(model, converted, method="etsc", horizon=40)
    assert all(math.isfinite(layer.l1_error) for layer in report.layers)
