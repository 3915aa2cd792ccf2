"""The RTF kernel compared with the authors' own code, on their weights, inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.reference import reference
from tnnlm.kernels import RTFConfig, RTFKernel
from tnnlm.ops.toeplitz import toeplitz

EXACT = 1e-11
"""Tolerance relative to the largest value, in float64."""
SAME_SAMPLING = ("rtf", "rtf_shared")
"""Cases of an even length, at which the authors sample the spectrum at as many points as we do."""


def loaded(name: str, sampled: int | None = None) -> tuple[RTFKernel, dict[str, Tensor]]:
    """Return our kernel with the weights of a case, and the tensors of the case.

    ``sampled`` is the number of points of the spectrum; None takes the training length of the case.
    """
    case, metadata = reference(name)
    channels, groups = len(case["h_0"]), len(case["a_effective"])
    order, length = int(metadata["state_size"]), int(metadata["trunc_len"])
    config = RTFConfig(name="rtf", state_size=order, denominators=groups)
    kernel = RTFKernel(config, channels, sampled or length).double()
    # The authors keep all denominators and then all numerators in one tensor.
    a, b = case["ab"].split([groups, channels])
    weights = {"direct": case["h_0"], "numerator": b, "denominator": a}
    kernel.load_state_dict(weights)
    return kernel, case


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT * float(expected.abs().max()))


@pytest.mark.parametrize("name", SAME_SAMPLING)
@torch.no_grad()
def test_taps_and_outputs_are_those_of_the_authors(name: str) -> None:
    kernel, case = loaded(name)
    length = case["kernel"].shape[1]
    assert_equal(kernel(length), case["kernel"])
    assert_equal(toeplitz(case["x"], kernel(length)), case["y"])


@pytest.mark.parametrize("name", SAME_SAMPLING)
@torch.no_grad()
def test_numerator_and_taps_past_the_training_length_are_those_of_the_right_solve(name: str) -> None:
    kernel, case = loaded(name)
    params, long = kernel.recurrence(), case["taps_long"]
    assert_equal(params.numerator, case["numerator_corrected"])
    assert_equal(params.denominator, case["a_effective"])
    assert_equal(params.taps(long.shape[1]), long)
    assert_equal(kernel(long.shape[1]), long)


@torch.no_grad()
def test_at_an_odd_length_the_authors_sample_one_point_more() -> None:
    """The authors' FFT of an odd L has L + 1 points and ours L, by design: their weights fit at L + 1."""
    length = 33
    kernel, case = loaded("rtf_odd_length", sampled=length + 1)
    params, long = kernel.recurrence(), case["taps_long"]
    assert_equal(kernel(length), case["kernel"])
    assert_equal(toeplitz(case["x"], kernel(length)), case["y"])
    assert_equal(params.numerator, case["numerator_corrected"])
    assert_equal(params.taps(long.shape[1]), long)
    # With L points other lags wrap around: another kernel, whose own recurrence is as exact.
    ours, _ = loaded("rtf_odd_length")
    assert float((ours(length) - case["kernel"]).abs().max()) > 1e-4
    assert_equal(ours.recurrence().taps(length), ours(length))
