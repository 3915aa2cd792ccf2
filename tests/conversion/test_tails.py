"""Bounds of what follows the measured lags: they are never below the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import auto_horizon
from tnnlm.conversion.certify import certify_kernel
from tnnlm.conversion.convert import convert_kernel
from tnnlm.conversion.tails import recurrence_tail
from tnnlm.kernels import RTFConfig, RTFKernel, SGConvConfig, SGConvKernel
from tnnlm.ops.companion import CompanionParams


@pytest.mark.parametrize(
    ("gap", "pairs", "spacing"), [(1e-2, 1, 0.0), (1e-3, 2, 5e-4), (1e-3, 3, 5e-4), (1e-2, 6, 1e-4)]
)
def test_companion_bound_holds_for_clustered_poles(gap: float, pairs: int, spacing: float) -> None:
    poles = (1 - gap) * np.exp(1j * (0.5 + spacing * np.arange(pairs)))
    a = torch.from_numpy(np.poly(np.concatenate((poles, poles.conj()))).real)[None, 1:]
    c = torch.zeros_like(a)
    c[0, 0] = 1
    params = CompanionParams(torch.zeros(1).double(), c, a)
    truth = params.taps(int(60 / gap))[:, 256:].abs().sum(1)
    bound = recurrence_tail(params, 256)
    assert bool((bound >= truth).all())
    assert bool((bound <= 4 * truth).all())


def test_a_companion_recurrence_without_output_has_no_tail() -> None:
    params = CompanionParams(torch.zeros(2), torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.5], [-1.5]]))
    assert recurrence_tail(params, 8).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("pole", [1.01, 1.2, 1.5])
def test_error_of_a_window_of_a_growing_kernel_is_infinite(pole: float) -> None:
    kernel = RTFKernel(RTFConfig(name="rtf", state_size=1), 1, 32)
    with torch.no_grad():
        kernel.numerator.fill_(1.0)
        kernel.denominator.fill_(-pole)
    for method in ("window", "auto"):
        recipe = ConversionConfig(method=method, horizon=32)
        report = certify_kernel(kernel, convert_kernel(kernel, recipe, 32), 32, 32)
        assert report.l1_error == math.inf


def test_a_finite_kernel_with_a_gap_is_known_to_its_end() -> None:
    config = SGConvConfig(name="sgconv", kernel_dim=4, length=512, decay_min=1.0, decay_max=1.0)
    torch.manual_seed(0)
    kernel = SGConvKernel(config, 2, 16)
    with torch.no_grad():
        kernel.scales[2:-1] = 0
        kernel.scales[-1] *= 30
    horizon = auto_horizon(kernel, 16)
    assert horizon == 512
    recipe = ConversionConfig(method="window", horizon=16)
    report = certify_kernel(kernel, convert_kernel(kernel, recipe, 16), 16, 16)
    with torch.no_grad():
        k = kernel(512).double().abs()
    assert report.l1_error == pytest.approx(float((k[:, 16:].sum(1) / k.sum(1)).max()))
    assert report.tail_energy > 0.5
