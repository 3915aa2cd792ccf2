"""The promise of method ``auto``: the smallest state among recurrences that measurably meet the tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.models import FAMILIES, tiny_config
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, convert_taps
from tnnlm.conversion.auto import Attempt, choose
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.methods import convert
from tnnlm.conversion.source import Source, ToleranceError, relative_error
from tnnlm.conversion.window import window
from tnnlm.errors import UserError
from tnnlm.kernels import TNOConfig
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.ssm import SSMParams

AUTO = ConversionConfig(method="auto", tolerance=1e-3)
ROUGH = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rational(channels: int = 3) -> CompanionParams:
    """Return a recurrence with two poles per channel, of modulus 0.9."""
    a = torch.tensor([[-0.5, 0.81]], dtype=torch.float64).expand(channels, 2)
    return CompanionParams(torch.ones(channels).double(), torch.randn(channels, 2).double(), a)


def test_own_recurrence_is_measured_like_any_other() -> None:
    own = rational()
    k = own.taps(300)
    exact = convert(Source(k, own=own), AUTO)
    assert relative_error(k, exact.params) <= AUTO.tolerance
    wrong = own._replace(numerator=own.numerator.flip(1))
    found = convert(Source(k, own=wrong), AUTO)
    assert found.method != "companion"
    assert "companion: has a relative error of" in found.reason
    assert relative_error(k, found.params) <= AUTO.tolerance


def test_what_misses_at_8_lengths_is_passed_over_and_named() -> None:
    attempts = [
        Attempt("etsc", "etsc", lambda _: etsc(ROUGH)),
        Attempt("window", "window", lambda _: window(ROUGH)),
    ]
    found = choose(Source(ROUGH, finite=True, reach=320), 1e-3, attempts)
    assert found.method == "window"
    assert "etsc: has a relative error of" in found.reason
    assert "over 320 lags" in found.reason


def test_zeros_at_the_end_of_a_finite_kernel_cost_nothing() -> None:
    k = torch.nn.functional.pad(ROUGH, (0, 200))
    params, report = convert_taps(k, method="auto", finite=True)
    assert report.order == 40
    assert torch.equal(params.taps(240), k)


def test_sgconv_is_converted_by_its_exact_recurrence_or_a_smaller_one() -> None:
    model = CausalLM(tiny_config(kernel=FAMILIES["sgconv"](), max_length=128)).eval()
    _, layers = convert_layers(model, AUTO)
    for kernel, layer in zip(kernels(model), layers, strict=True):
        own = kernel.recurrence()
        assert own is not None
        with torch.no_grad():
            assert relative_error(kernel(8 * 128), layer.params) <= AUTO.tolerance
            assert relative_error(kernel(8 * 128), own) <= 1e-6
        assert "multirate" in layer.reason


def modes(k: Tensor, count: int) -> SSMParams:
    return SSMParams(k.new_zeros(len(k), 0), k.new_full((2, count), 0.5), k.new_zeros(len(k), 2, count))


def test_multiply_adds_decide_between_nearly_equal_states_only() -> None:
    k = torch.zeros(3, 40, dtype=torch.float64)
    windowed = Attempt("window", "window", lambda _: window(k))
    # 39 numbers of window take 40 multiply-adds; 32 and 10 numbers of modes take 96 and 30.
    near = choose(Source(k), 1e-3, [Attempt("balanced", "balanced", lambda _: modes(k, 16)), windowed])
    assert near.method == "window"
    assert near.reason.startswith("fewest multiply-adds")
    far = choose(Source(k), 1e-3, [Attempt("balanced", "balanced", lambda _: modes(k, 15)), windowed])
    assert far.method == "balanced"
    assert far.reason.startswith("smallest state")


def test_poles_per_channel_are_chosen_where_they_are_cheaper_than_shared_ones() -> None:
    r = torch.linspace(0.5, 0.95, 12, dtype=torch.float64)
    k = (r[:, None] ** torch.arange(400)).float()
    params, report = convert_taps(k, method="auto")
    assert (report.method, report.order) == ("balanced", 1)
    assert params.multiply_adds() == 12 * 6
    assert report.relative_tap_error <= 1e-6


def test_a_sample_decides_whether_a_second_form_of_a_method_is_tried() -> None:
    k = torch.zeros(3, 40, dtype=torch.float64)
    first = Attempt("balanced", "shared", lambda _: modes(k, 4))
    for count, made in ((4, 4), (3, 2)):
        second = Attempt("balanced", "channel", lambda _: modes(k, 2), lambda _, n=count: modes(k[:1], n))
        assert choose(Source(k), 1e-3, [first, second]).params.residues.shape[2] == made


def test_what_costs_more_than_a_known_recurrence_is_neither_computed_nor_measured() -> None:
    k = torch.zeros(3, 40, dtype=torch.float64)
    limits: list[int | None] = []

    def costly(limit: int | None) -> SSMParams:
        limits.append(limit)
        return modes(k, 20).to_dtype(torch.float64)._replace(residues=k.new_full((3, 2, 20), math.nan))

    attempts = [
        Attempt("dear", "dear", costly),
        Attempt("own", "own", lambda _: modes(k, 8)),
        Attempt("balanced", "balanced", costly),
    ]
    found = choose(Source(k), 1e-3, attempts)
    assert found.method == "own"
    # 16 numbers and 48 multiply-adds: orders of 13 to 15 are nearly as large, and take fewer of those.
    assert limits == [None, 15]
    assert "dear: has a relative error of inf" in found.reason
    assert "balanced: costs more" in found.reason


def test_the_limit_of_the_order_does_not_change_the_choice() -> None:
    own = rational(30)
    angles = torch.linspace(0.2, 3, 30, dtype=torch.float64)
    own = own._replace(denominator=torch.stack((-1.8 * angles.cos(), 0.81 + 0 * angles), dim=1))
    k = own.taps(300).float()
    source = Source(k, own=own.to_dtype(torch.float32), finite=True)
    assert convert(source, AUTO).method == "companion"
    assert "can't be met, the smallest relative error up to order 1 " in convert(source, AUTO).reason
    assert convert(source._replace(own=None), AUTO).params.order() == 3


def test_a_kernel_longer_than_the_horizon_is_refused_unless_the_horizon_was_set() -> None:
    model = CausalLM(tiny_config(kernel=TNOConfig(decay=1.0, rpe_dim=8, rpe_layers=1))).eval()
    with pytest.raises(UserError, match=r"layer 0: method auto: .* comes closest with a relative error"):
        convert_layers(model, AUTO)
    for method in ("auto", "balanced", "etsc", "window"):
        recipe = ConversionConfig(method=method, horizon=24, tolerance=0.05)
        _, layers = convert_layers(model, recipe)
        for kernel, layer in zip(kernels(model), layers, strict=True):
            with torch.no_grad():
                assert relative_error(kernel(24), layer.params) <= 0.05


@pytest.mark.parametrize("poles", ["shared", "channel"])
def test_tolerance_holds_after_rounding_to_float32_or_is_refused(poles: str) -> None:
    lags = torch.arange(256, dtype=torch.float64)
    # Two nearly equal poles have large residues that cancel each other, and float32 rounds them.
    k = torch.stack([lags * 0.9**lags, (lags - 8).square() * 0.9**lags]).float()
    met, refused = 0, []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        try:
            params, report = convert_taps(k, tolerance=tolerance, poles=poles)
        except ToleranceError as error:
            refused.append((tolerance, error.reached))
            continue
        met += 1
        assert report.relative_tap_error <= tolerance
        assert (params.taps(256) - k.double()).norm() <= tolerance * k.double().norm()
    assert met >= 2
    assert all(reached > tolerance for tolerance, reached in refused)


def test_the_progress_bar_names_the_method_that_is_measured() -> None:
    titles: list[str] = []

    def progress(items: Sequence[Any], title: str) -> Sequence[Any]:
        titles.append(title)
        return items

    convert(Source(ROUGH), AUTO, progress)
    assert titles == [
        "method 1 of 4, window",
        "method 2 of 4, etsc",
        "method 3 of 4, balanced with shared poles",
        "method 4 of 4, balanced with channel poles",
    ]
