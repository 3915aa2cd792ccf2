"""Conversion of arbitrary taps by the public function (invariants 3, 5 and 6 of CONTRIBUTING.md)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tnnlm.conversion import convert_taps
from tnnlm.errors import UserError
from tnnlm.ops.reference import recurrence_loop, toeplitz_dense

TRAINED = 128
"""Training length in lags; the taps given are 8 times as long."""
LENGTH = 8 * TRAINED


def damped_cosines() -> Tensor:
    """Return sums of five damped cosines, the same five in every channel."""
    lags = torch.arange(LENGTH, dtype=torch.float64)
    radius = torch.tensor([0.5, 0.8, 0.9, 0.95, 0.98], dtype=torch.float64)
    angle = torch.tensor([0.0, 0.3, 1.0, 2.0, 3.0], dtype=torch.float64)
    basis = radius[:, None] ** lags * torch.cos(angle[:, None] * lags)
    return torch.randn(12, 5, dtype=torch.float64) @ basis


def diagonal_s4() -> Tensor:
    """Return taps of S4D-Lin (arXiv 2206.11893): poles -1/2 + i pi n, one time step per channel."""
    modes, channels = 6, 4
    step = torch.logspace(-1.7, -0.7, channels, dtype=torch.float64)
    a = torch.complex(
        torch.full((modes,), -0.5, dtype=torch.float64), math.pi * torch.arange(modes, dtype=torch.float64)
    )
    c = torch.randn(channels, modes, dtype=torch.complex128)
    lags = torch.arange(LENGTH)
    discrete = torch.exp(step[:, None] * a)
    return 2 * torch.einsum("en,enl->el", c * (discrete - 1) / a, discrete[..., None] ** lags).real


def implicit_filter() -> Tensor:
    """Return taps as in Hyena (arXiv 2302.10866): a small network on sines of the lag, times a decay."""
    t = torch.arange(LENGTH, dtype=torch.float64)[:, None] / TRAINED
    features = torch.cat([torch.sin(t * 2 * math.pi * f + p) for f in (0.5, 1, 2) for p in (0.0, 1.0)], dim=1)
    hidden = torch.sin(features @ torch.randn(6, 16, dtype=torch.float64))
    rates = torch.linspace(4, 12, 10, dtype=torch.float64)
    return (hidden @ torch.randn(16, 10, dtype=torch.float64) * torch.exp(-t * rates)).T.contiguous()


KERNELS = {"damped cosines": damped_cosines, "diagonal S4": diagonal_s4, "implicit filter": implicit_filter}


@pytest.fixture(params=KERNELS, ids=lambda name: name.replace(" ", "-"))
def taps(request: pytest.FixtureRequest) -> Tensor:
    return KERNELS[request.param]()


@pytest.mark.parametrize("poles", ["shared", "channel"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_balanced_meets_its_tolerance(taps: Tensor, tolerance: float, poles: str) -> None:
    params, report = convert_taps(taps.float(), tolerance=tolerance, poles=poles)
    error = (taps - params.taps(LENGTH)).norm() / taps.norm()
    assert error <= tolerance * 1.01
    assert report.relative_tap_error == pytest.approx(float(error), rel=0.05, abs=1e-7)
    assert report.order < 128
    assert report.largest_pole < 1
    assert params.residues.dtype == torch.float32


@pytest.mark.parametrize("method", ["balanced", "etsc", "window", "auto"])
def test_step_prefill_and_dense_product_agree(taps: Tensor, method: str) -> None:
    if method in ("etsc", "window"):
        taps = taps[:, :TRAINED]
    params, _ = convert_taps(taps, method=method, tolerance=1e-3)
    x = torch.randn(2, 60, len(taps), dtype=torch.float64)
    effective = toeplitz_dense(x, params.taps(60))
    torch.testing.assert_close(recurrence_loop(params, x), effective, rtol=1e-9, atol=1e-9)
    y, _ = params.prefill(x, params.init_state(2))
    torch.testing.assert_close(y, effective, rtol=1e-8, atol=1e-8)
    if method in ("etsc", "window"):
        torch.testing.assert_close(y, toeplitz_dense(x, taps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [64, 100, 1024])
def test_etsc_reproduces_taps_in_both_precisions(taps: Tensor, n: int) -> None:
    for k, allowed in ((taps[:, :n], 1e-12), (taps[:, :n].float(), 5e-6)):
        _, report = convert_taps(k, method="etsc")
        assert report.relative_tap_error <= allowed
        assert report.order == n


def test_order_of_damped_cosines_is_found() -> None:
    params, report = convert_taps(damped_cosines(), tolerance=1e-6)
    # Four conjugate pairs, and the real pole at angle 0.
    assert report.order == 9
    found = torch.complex(*params.poles).abs().sort().values
    torch.testing.assert_close(
        found, torch.tensor([0.5, 0.8, 0.9, 0.95, 0.98], dtype=torch.float64), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("poles", ["shared", "channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_window_taps_absorb_a_rough_beginning(poles: str, dtype: torch.dtype) -> None:
    k = damped_cosines()
    k[:, :16] += torch.randn(12, 16, dtype=torch.float64)
    k = k.to(dtype)
    with pytest.raises(UserError, match="can't be met"):
        convert_taps(k, tolerance=1e-4, poles=poles, window_taps=8)
    params, report = convert_taps(k, tolerance=1e-4, poles=poles, window_taps=16)
    assert params.window.shape == (12, 16)
    assert report.order <= 16 + 10
    assert report.relative_tap_error <= 1e-4
    assert (params.taps(16) - k[:, :16]).norm() <= 1e-5 * k.norm()
    # Large residues that cancel each other would lose the digits of float32 in the step.
    assert params.residues.abs().max() <= 100 * k.abs().max()


@pytest.mark.parametrize("poles", ["shared", "channel"])
def test_modes_that_have_decayed_after_the_window_are_kept_if_needed(poles: str) -> None:
    lags = torch.arange(400, dtype=torch.float64)
    # At lag 16, the faster pole has decayed to 1e-5 of the slower one.
    k = 0.97**lags + torch.tensor([[3e3], [1e3]], dtype=torch.float64) * 0.5**lags
    params, report = convert_taps(k, tolerance=1e-5, poles=poles, window_taps=16)
    assert report.order == 18
    assert (params.taps(400) - k).norm() <= 1e-5 * k.norm()
    _, report = convert_taps(k.float(), tolerance=1e-5, poles=poles, window_taps=16)
    assert report.relative_tap_error <= 1e-5


def test_an_order_counts_the_window_taps() -> None:
    k = damped_cosines()
    _, report = convert_taps(k, order=12, window_taps=4)
    assert report.order <= 12
    with pytest.raises(UserError, match="window taps"):
        convert_taps(k, order=4, window_taps=4)
    with pytest.raises(UserError, match="horizon"):
        convert_taps(k, window_taps=LENGTH)


@pytest.mark.parametrize("order", [2, 4, 8, 12])
def test_balanced_is_near_the_hankel_bound(order: int) -> None:
    _, report = convert_taps(implicit_filter(), order=order)
    assert report.order <= order
    assert report.hankel_ratio is not None
    assert 0.99 <= report.hankel_ratio <= 2.5


def test_auto_takes_the_smallest_state() -> None:
    _, smooth = convert_taps(implicit_filter(), method="auto")
    assert smooth.method == "balanced"
    assert "balanced" in smooth.reason
    rough = torch.randn(40, 300, dtype=torch.float64)
    params, finite = convert_taps(rough, method="auto")
    assert finite.method == "window"
    assert "can't be met" in finite.reason
    assert torch.equal(params.taps(300), rough)


def test_unrelated_channels_get_separate_poles() -> None:
    lags = torch.arange(400, dtype=torch.float64)
    radius = torch.linspace(0.3, 0.97, 60, dtype=torch.float64)
    k = radius[:, None] ** lags * torch.cos(torch.linspace(0, 3, 60, dtype=torch.float64)[:, None] * lags)
    _, own = convert_taps(k, poles="channel")
    _, shared = convert_taps(k, poles="shared")
    assert own.order <= 2
    assert shared.order > 10


def test_arrays_and_single_channels_are_accepted() -> None:
    k = 0.9 ** np.arange(200)
    params, report = convert_taps(k, tolerance=1e-6)
    assert report.order == 1
    assert float(params.poles[0, 0]) == pytest.approx(0.9, abs=1e-6)
    _, report = convert_taps((k * 100).astype(np.int64).tolist(), method="window")
    assert report.relative_tap_error == 0


def test_horizon_and_decay_are_those_of_etsc() -> None:
    lags = torch.arange(300, dtype=torch.float64)
    k = torch.randn(3, 300, dtype=torch.float64) * 0.95**lags
    params, report = convert_taps(k, method="etsc", horizon=100, decay=0.95)
    assert report.relative_tap_error <= 1e-12
    assert report.tail_energy > 0
    assert report.largest_pole == pytest.approx(0.95)
    assert params.poles.shape[-1] == 50


def test_taps_that_do_not_decay_get_poles_inside_the_unit_circle() -> None:
    lags = torch.arange(400, dtype=torch.float64)
    k = torch.stack([torch.cos(0.1 * lags), 1 + 0.5 * torch.cos(0.7 * lags)])
    params, report = convert_taps(k, tolerance=1e-3)
    assert report.largest_pole < 1
    assert report.relative_tap_error <= 1e-3
    # The recurrence also extrapolates past the given taps.
    later = torch.cos(0.1 * torch.arange(800, dtype=torch.float64))
    assert (params.taps(800)[0] - later).abs().max() < 0.05


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "not finite": ([[1.0, math.nan]], {}, "not finite"),
    "empty": (np.zeros((2, 0)), {}, "at least one"),
    "three axes": (np.zeros((2, 2, 2)), {}, "expected"),
    "complex": (np.zeros((2, 2), dtype=complex), {}, "complex"),
    "order 0": ([[1.0, 0.5]], {"order": 0}, "order 0"),
    "order over horizon": ([[1.0, 0.5]], {"order": 3}, "order 3"),
    "tolerance": ([[1.0, 0.5]], {"tolerance": 0.0}, "tolerance"),
    "decay 0": ([[1.0, 0.5]], {"decay": 0.0, "method": "etsc"}, "decay"),
    "decay above 1": ([[1.0, 0.5]], {"decay": 1.1, "method": "etsc"}, "decay"),
    "method": ([[1.0, 0.5]], {"method": "magic"}, "magic"),
    "poles": ([[1.0, 0.5]], {"poles": "some"}, "poles"),
    "horizon": ([[1.0, 0.5]], {"horizon": 5}, "horizon 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_input_is_one_clear_error(case: str) -> None:
    taps, options, named = BAD[case]
    with pytest.raises(UserError, match=named):
        convert_taps(taps, **options)


def test_tolerance_that_cannot_be_met_reports_the_error_reached() -> None:
    with pytest.raises(
        UserError, match=r"1e-06: can't be met, the smallest relative error .* order \d+ is \d"
    ):
        convert_taps(torch.randn(50, 400), tolerance=1e-6)


def test_gradient_fits_but_worse_than_the_closed_form() -> None:
    k = damped_cosines()[:4, :100]
    _, fitted = convert_taps(k, method="gradient", order=10, gradient_steps=400, gradient_lr=3e-2)
    _, reduced = convert_taps(k, method="balanced", order=9)
    assert fitted.relative_tap_error < 0.5
    assert reduced.relative_tap_error < fitted.relative_tap_error
    assert fitted.largest_pole < 1


@pytest.mark.parametrize("order", [1, 2, 7, 8])
def test_gradient_starts_from_the_whole_half_circle(order: int) -> None:
    params, _ = convert_taps(damped_cosines()[:2, :50], method="gradient", order=order, gradient_steps=1)
    angle = torch.atan2(params.poles[1], params.poles[0])
    expected = torch.linspace(0, math.pi, (order + 1) // 2, dtype=torch.float64)
    torch.testing.assert_close(angle, expected, rtol=0, atol=1e-6)
