"""Hankel singular values and Hankel ratios against dense decompositions."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from tests.support.reference import reference
from tnnlm.conversion import convert_taps
from tnnlm.conversion.certify import RATIO_SLACK, certify
from tnnlm.conversion.linalg import compress, hankel_singular_values, hankel_svd
from tnnlm.conversion.source import LayerConversion
from tnnlm.errors import UserError
from tnnlm.ops.ssm import SSMParams

CASES, _ = reference("hankel_singular_values")
NAMES = sorted({name.partition(".")[0] for name in CASES})


def dense(k: Tensor, columns: int) -> Tensor:
    """Return the stacked Hankel matrices of taps k (E, T) with only known entries."""
    rows = k.shape[1] - columns + 1
    return torch.cat([torch.stack([row[i : i + columns] for i in range(rows)]) for row in k])


@pytest.mark.parametrize("name", NAMES)
def test_singular_values_are_those_of_the_reference(name: str) -> None:
    k = CASES[f"{name}.taps"]
    f = compress(k, 128, drop=1e-12)
    for taps, columns, suffix in ((f, 64, "sigma_half"), (f, 128, "sigma_zero_padded")):
        expected = CASES[f"{name}.{suffix}"]
        found = hankel_singular_values(taps, columns, columns)
        # Values are square roots of those of H^T H, which hides what is below the root of rounding.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-7 * float(expected[0]) + 1e-15)
        sampled = hankel_svd(taps.unsqueeze(0), 8, columns)[0][0]
        assert (sampled <= expected[:8] * (1 + 1e-10) + 1e-7 * expected[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_reported_ratio_is_that_of_a_dense_computation_and_at_least_one(name: str) -> None:
    k = CASES[f"{name}.taps"]
    for order in (1, 3, 8, 20):
        for horizon in (16, 33, 64):
            try:
                params, report = convert_taps(k, order=min(order, horizon), horizon=horizon)
            except UserError:  # state matrices of a delay are not diagonalisable
                continue
            if report.hankel_ratio is None:
                continue
            known = k[:, : 2 * horizon]
            columns = (known.shape[1] + 1) // 2
            sigma = torch.linalg.svdvals(dense(known, columns))
            error = torch.linalg.svdvals(dense(known - params.taps(known.shape[1]), columns))[0]
            expected = max(1.0, float(error / sigma[report.order]))
            assert report.hankel_ratio == pytest.approx(expected, rel=1e-3), (order, horizon)


def test_no_ratio_where_the_order_is_that_of_the_matrix() -> None:
    # With 8 lags of horizon, the Hankel matrix of 16 lags has 8 columns, and no 9th singular value.
    k = torch.randn(1, 64, dtype=torch.float64)
    for order in (8, 12):
        params = SSMParams(k.new_zeros(1, 0), k.new_full((2, order // 2), 0.4), k.new_ones(1, 2, order // 2))
        assert params.order() == order
        assert certify(k, LayerConversion(params, "balanced", ""), 8).hankel_ratio is None


def test_an_impossible_ratio_is_an_error_of_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    k = CASES["damped.taps"]
    params, report = convert_taps(k, order=3)
    assert report.hankel_ratio is not None

    def too_large(f: Tensor, count: int, columns: int) -> Tensor:
        found = hankel_singular_values(f, count, columns)
        return found * (1 if count == 1 else report.hankel_ratio / (1 - 2 * RATIO_SLACK))

    # The package has a function of the same name as the module.
    monkeypatch.setattr(sys.modules["tnnlm.conversion.certify"], "hankel_singular_values", too_large)
    with pytest.raises(ArithmeticError, match="below its lower bound"):
        certify(k, LayerConversion(params, "balanced", ""), k.shape[1])
