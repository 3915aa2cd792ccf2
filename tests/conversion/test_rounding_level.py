"""Reported errors are the true ones, even where those are as small as the rounding of a float64 number."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

from tnnlm.conversion import convert_taps
from tnnlm.conversion.certify import certify
from tnnlm.conversion.source import LayerConversion, relative_error
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.ssm import SSMParams

DECAYS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999)
DIGITS = 50


def modes_in_digits(params: SSMParams, length: int) -> list[list[mpmath.mpf]]:
    """Return the taps of every channel, with ``DIGITS`` digits."""
    rows = []
    for e, window in enumerate(params.window.double().tolist()):
        planes = params.poles if params.poles.dim() == 2 else params.poles[e]
        poles = [mpmath.mpc(*pole) for pole in planes.T.tolist()]
        terms = [mpmath.mpc(*c) for c in params.residues[e].double().T.tolist()]
        row = []
        for lag in range(length):
            row.append(mpmath.fsum([c.real for c in terms] + window[lag : lag + 1]))
            terms = [c * pole for c, pole in zip(terms, poles, strict=True)]
        rows.append(row)
    return rows


def companion_in_digits(params: CompanionParams, length: int) -> list[list[mpmath.mpf]]:
    rows = []
    for d, c, a in zip(*(part.double().tolist() for part in params), strict=True):
        row = [mpmath.mpf(d)]
        for lag in range(length - 1):
            known = mpmath.mpf(c[lag] if lag < len(c) else 0)
            row.append(known - mpmath.fsum(a[i] * row[lag - i] for i in range(min(len(a), lag))))
        rows.append(row)
    return rows


def true_error(k: Tensor, found: list[list[mpmath.mpf]]) -> float:
    pairs = [
        pair for row, taps in zip(k.tolist(), found, strict=True) for pair in zip(row, taps, strict=True)
    ]
    missed = mpmath.fsum((mpmath.mpf(x) - y) ** 2 for x, y in pairs)
    return float(mpmath.sqrt(missed / mpmath.fsum(mpmath.mpf(x) ** 2 for x, _ in pairs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 20, 33])
def test_the_error_of_etsc_is_the_true_one(length: int, dtype: torch.dtype) -> None:
    for decay in DECAYS:
        k = torch.randn(2, length, dtype=torch.float64) * decay ** torch.arange(length)
        k = k.to(dtype)
        params, report = convert_taps(k, method="etsc", decay=decay)
        with mpmath.workdps(DIGITS):
            truth = true_error(k, modes_in_digits(params, length))
        assert report.relative_tap_error == pytest.approx(truth, rel=1e-4, abs=1e-30), (decay, dtype)
        assert relative_error(k, params) == pytest.approx(truth, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e290])
def test_modes_that_fit_with_a_window_are_measured_exactly(scale: float) -> None:
    params = SSMParams(
        torch.randn(2, 3, dtype=torch.float64) * scale,
        torch.tensor([[[0.9, 0.3], [0.2, 0.0]], [[0.5, -0.7], [0.6, 0.0]]], dtype=torch.float64),
        torch.randn(2, 2, 2, dtype=torch.float64) * scale,
    )
    with mpmath.workdps(DIGITS):
        exact = modes_in_digits(params, 24)
        k = torch.tensor([[float(x) for x in row] for row in exact], dtype=torch.float64)
        truth = true_error(k, exact)
    assert 1e-18 < truth < 1e-15
    assert relative_error(k, params) == pytest.approx(truth, rel=1e-4)
    torch.testing.assert_close(params.taps(24), k, rtol=0, atol=1e-15 * scale)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e290])
def test_the_error_of_a_companion_recurrence_is_the_true_one(scale: float) -> None:
    a = torch.tensor([[-1.2, 0.81, -0.2], [0.5, -0.3, 0.1]], dtype=torch.float64)
    params = CompanionParams(*(x * scale for x in (torch.randn(2).double(), torch.randn(2, 3).double())), a)
    for length in (1, 2, 3, 40):
        with mpmath.workdps(DIGITS):
            exact = companion_in_digits(params, length)
            k = torch.tensor([[float(x) for x in row] for row in exact], dtype=torch.float64)
            truth = true_error(k, exact)
        report = certify(k, LayerConversion(params, "companion", ""), length)
        assert report.relative_tap_error == pytest.approx(truth, rel=1e-4, abs=1e-30)
