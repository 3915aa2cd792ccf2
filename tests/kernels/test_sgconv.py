"""The SGConv kernel: the published construction, lags, norm and skip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.support.models import FAMILIES, tiny_config
from tests.support.reference import reference
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.kernels import SGConvConfig, SGConvKernel, TwoSidedKernel
from tnnlm.kernels.sgconv import _stretched
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import recurrences
from tnnlm.modules import BiConv, LongConv


def kernel_of(max_length: int = 100, **settings: object) -> SGConvKernel:
    return SGConvKernel(SGConvConfig(name="sgconv", **{"kernel_dim": 8, **settings}), 5, max_length).double()


def test_scales_are_upsampled_1_1_2_4_and_cover_the_length() -> None:
    kernel = kernel_of(100)
    # The scales have 8, 8, 16, 32 and 64 lags.
    assert kernel.scales.shape == (5, 5, 8)
    with torch.no_grad():
        kernel.skip.zero_()
        k = kernel(100) * kernel.initial_norm[:, None]
        whole = torch.cat(
            [
                interpolate(values[None], size=width, mode="linear")[0] * 0.5**index
                for index, (values, width) in enumerate(zip(kernel.scales, (8, 8, 16, 32, 64), strict=True))
            ],
            dim=1,
        )
    # The norm is that of all 128 lags, not of the 100 that are used.
    torch.testing.assert_close(kernel.initial_norm, whole.norm(dim=1), rtol=1e-6, atol=0)
    start = 0
    for index, width in enumerate((8, 8, 16, 32, 64)):
        expected = interpolate(kernel.scales[index][None], size=width, mode="linear")[0] * 0.5**index
        stop = min(start + width, 100)
        torch.testing.assert_close(k[:, start:stop], expected[:, : stop - start])
        start = stop


def test_norm_at_initialisation_is_one_and_stays_in_the_checkpoint() -> None:
    kernel = kernel_of(128)
    with torch.no_grad():
        skip = kernel.skip.clone()
        kernel.skip.zero_()
        torch.testing.assert_close(kernel(128).norm(dim=1), torch.ones(5, dtype=torch.float64))
        kernel.scales.mul_(3)
        torch.testing.assert_close(kernel(128).norm(dim=1), torch.full((5,), 3.0, dtype=torch.float64))
        kernel.skip.copy_(skip)
    again = kernel_of(128)
    again.load_state_dict(kernel.state_dict())
    assert torch.equal(again(100), kernel(100))


def test_decay_is_spread_over_the_channels() -> None:
    kernel = kernel_of(decay_min=2.0, decay_max=4.0)
    torch.testing.assert_close(kernel.amplitudes[1], 1 / torch.linspace(2, 4, 5).double())
    torch.testing.assert_close(kernel.amplitudes[2], kernel.amplitudes[1] ** 2)


def test_skip_is_on_lag_0_alone() -> None:
    kernel = kernel_of()
    before = kernel(20).detach()
    with torch.no_grad():
        kernel.skip += 1
    difference = kernel(20).detach() - before
    torch.testing.assert_close(difference[:, 0], torch.ones(5, dtype=torch.float64))
    assert not difference[:, 1:].any()


@pytest.mark.parametrize("length", [1, 7, 99, 100, 101, 300])
def test_kernel_may_be_shorter_or_longer_than_the_sequence(length: int) -> None:
    kernel = kernel_of(100)
    k = kernel(length)
    assert k.shape == (5, length)
    assert torch.equal(k[:, :100], kernel(100)[:, :length])
    assert not k[:, 100:].any()


@pytest.mark.parametrize("kernel_dim", [1, 64, 200])
def test_any_number_of_parameters_builds(kernel_dim: int) -> None:
    assert torch.isfinite(kernel_of(100, kernel_dim=kernel_dim)(100)).all()
    assert kernel_of(100, length=30)(100)[:, 30:].abs().sum() == 0


@pytest.mark.parametrize("name", ["sgconv_pow2", "sgconv_odd_length"])
def test_kernel_is_the_published_one(name: str) -> None:
    tensors, metadata = reference(name)
    length = int(metadata["l_max"])
    kernel = kernel_of(length, kernel_dim=int(metadata["kernel_dim"]))
    load_published(kernel, tensors, 0)
    taps = torch.cat((tensors["kernel"][0, :, :1] + tensors["weights.D"].T, tensors["kernel"][0, :, 1:]), 1)
    torch.testing.assert_close(kernel(length), taps, rtol=0, atol=1e-12)
    torch.testing.assert_close(LongConv(kernel)(tensors["x"]), tensors["y"], rtol=0, atol=1e-11)


def test_bidirectional_kernel_is_the_published_one() -> None:
    tensors, metadata = reference("sgconv_bidirectional")
    length = int(metadata["l_max"])
    config = SGConvConfig(name="sgconv", kernel_dim=int(metadata["kernel_dim"]))
    kernel = TwoSidedKernel(config, 5, length).double()
    assert isinstance(kernel.kernel, SGConvKernel)
    assert isinstance(kernel.reverse, SGConvKernel)
    load_published(kernel.kernel, tensors, 0)
    load_published(kernel.reverse, tensors, 1)
    torch.testing.assert_close(BiConv(kernel)(tensors["x"]), tensors["y"], rtol=0, atol=1e-11)
    # Models trained before the setting existed keep their shift.
    before = TwoSidedKernel(replace(config, reverse_lag=0), 5, length).double()
    before.load_state_dict(kernel.state_dict())
    expected = torch.cat((kernel.reverse(length)[:, 1:].flip(1), kernel.kernel(length)), dim=1)
    torch.testing.assert_close(before(length), expected, rtol=0, atol=0)


def load_published(kernel: SGConvKernel, tensors: Mapping[str, Tensor], direction: int) -> None:
    """Load the authors' weights of one direction: their amplitudes are ours times 2^(scales - 1)."""
    count = len(kernel.scales)
    parts = [tensors[f"weights.kernel_list.{index}"][direction] for index in range(count)]
    norm = tensors["weights.kernel_norm"].reshape(-1, 5)[direction]
    with torch.no_grad():
        kernel.scales.copy_(torch.stack(parts))
        own = kernel._concatenated().norm(dim=1)
        # The authors' norm was that of these weights, as ours at initialisation.
        torch.testing.assert_close(norm / 2.0 ** (count - 1), own, rtol=1e-12, atol=0)
        kernel.initial_norm.copy_(own)
        if direction == 0:
            kernel.skip.copy_(tensors["weights.D"][0])


@pytest.mark.parametrize("factor", [1, 2, 64])
def test_stretched_values_are_those_of_interpolate_and_so_are_gradients(factor: int) -> None:
    for count in (1, 2, 7):
        values = torch.randn(3, count, dtype=torch.float64, requires_grad=True)
        expected = interpolate(values[None], size=count * factor, mode="linear")[0]
        torch.testing.assert_close(_stretched(values, factor), expected, rtol=0, atol=1e-15)
        weight = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad((y * weight).sum(), values)[0] for y in (_stretched(values, factor), expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)


def test_other_kernels_have_no_multirate_form_and_sgconv_has_no_companion_form() -> None:
    for family, method in (("tno", "multirate"), ("rtf", "multirate"), ("sgconv", "companion")):
        model = CausalLM(tiny_config(kernel=FAMILIES[family]()))
        with pytest.raises(UserError, match=f"layer 0: method {method}: .* defines no .*recurrence"):
            convert_model(model, method=method)


def test_multirate_form_ignores_the_horizon() -> None:
    model = CausalLM(tiny_config(kernel=FAMILIES["sgconv"]()))
    for horizon in (5, 100):
        (params, _) = recurrences(convert_model(model, method="multirate", horizon=horizon))
        with torch.no_grad():
            torch.testing.assert_close(params.taps(64).float(), model.layers[0].mixer.conv.kernel(64))
