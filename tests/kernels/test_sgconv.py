"""The SGConv kernel: the published construction, lags, norm and skip."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from tests.support.models import FAMILIES, tiny_config
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.kernels import SGConvConfig, SGConvKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import recurrences


def kernel_of(max_length: int = 100, **settings: object) -> SGConvKernel:
    return SGConvKernel(SGConvConfig(name="sgconv", **{"kernel_dim": 8, **settings}), 5, max_length).double()


def test_scales_are_upsampled_1_1_2_4_and_cover_the_length() -> None:
    kernel = kernel_of(100)
    # The scales have 8, 8, 16, 32 and 64 lags.
    assert kernel.scales.shape == (5, 5, 8)
    with torch.no_grad():
        kernel.skip.zero_()
        k = kernel(100) * kernel.initial_norm[:, None]
    start = 0
    for index, width in enumerate((8, 8, 16, 32, 64)):
        expected = interpolate(kernel.scales[index][None], size=width, mode="linear")[0] * 0.5**index
        stop = min(start + width, 100)
        torch.testing.assert_close(k[:, start:stop], expected[:, : stop - start])
        start = stop


def test_norm_at_initialisation_is_one_and_stays_in_the_checkpoint() -> None:
    kernel = kernel_of()
    with torch.no_grad():
        skip = kernel.skip.clone()
        kernel.skip.zero_()
        torch.testing.assert_close(kernel(100).norm(dim=1), torch.ones(5, dtype=torch.float64))
        kernel.scales.mul_(3)
        torch.testing.assert_close(kernel(100).norm(dim=1), torch.full((5,), 3.0, dtype=torch.float64))
        kernel.skip.copy_(skip)
    again = kernel_of()
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
