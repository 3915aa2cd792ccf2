"""The RTF kernel: spectrum, wrapping, companion recurrence at every lag, stability, and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.models import tiny_config
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, convert_model
from tnnlm.errors import ConfigError, UserError
from tnnlm.kernels import RTFConfig, RTFKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.ops.reference import recurrence_loop
from tnnlm.ops.toeplitz import toeplitz

CHANNELS, LENGTH = 4, 64


def kernel_of(length: int = LENGTH, channels: int = CHANNELS, **settings: object) -> RTFKernel:
    return RTFKernel(RTFConfig(name="rtf", **settings), channels, length).double()


def stable_denominators(radius: float, pairs: int, rows: int) -> torch.Tensor:
    """Return a[1] .. a[2 pairs] for conjugate poles spread over the half circle, of modulus up to
    ``radius``."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(rows):
        angles = np.pi * (np.arange(pairs) + 0.2 + 0.6 * rng.random(pairs)) / pairs
        moduli = radius * np.concatenate(([1.0], 0.3 + 0.7 * rng.random(pairs - 1)))
        made.append(np.poly(np.concatenate((moduli * np.exp(1j * angles), moduli * np.exp(-1j * angles)))))
    return torch.from_numpy(np.real(np.stack(made)))[:, 1:]


def with_poles(radius: float, denominators: int | None = None, pairs: int = 8) -> RTFKernel:
    kernel = kernel_of(state_size=2 * pairs, denominators=denominators)
    with torch.no_grad():
        kernel.numerator.normal_()
        kernel.denominator.copy_(stable_denominators(radius, pairs, len(kernel.denominator)))
    return kernel


@pytest.mark.parametrize("radius", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("denominators", [None, 2, 1])
@torch.no_grad()
def test_kernel_and_companion_recurrence_agree_over_4_training_lengths(
    radius: float, denominators: int | None
) -> None:
    kernel = with_poles(radius, denominators)
    params = kernel.recurrence()
    assert params.largest_pole() == pytest.approx(radius, rel=1e-6)
    impulse = torch.zeros(1, 4 * LENGTH, CHANNELS, dtype=torch.float64)
    impulse[:, 0] = 1
    loop = recurrence_loop(params, impulse)[0].T
    scale = loop.norm()
    # Taps within the training length come from the FFT alone, those past it from the recurrence.
    assert (loop[:, :LENGTH] - kernel(LENGTH)).norm() <= 1e-9 * scale
    assert (loop - kernel(4 * LENGTH)).norm() <= 1e-9 * scale
    prefilled, _ = params.prefill(impulse, params.init_state(1))
    assert (loop - prefilled[0].T).norm() <= 1e-9 * scale


@torch.no_grad()
def test_numerator_solves_the_row_vector_system() -> None:
    kernel = with_poles(0.99, pairs=4)
    n, params = 8, kernel.recurrence()
    for channel in range(CHANNELS):
        matrix = torch.zeros(n, n, dtype=torch.float64)
        matrix[1:, :-1] = torch.eye(n - 1, dtype=torch.float64)
        matrix[0] = -kernel.denominator[channel]
        system = torch.eye(n, dtype=torch.float64) - torch.linalg.matrix_power(matrix, LENGTH)
        right = torch.linalg.solve(system.T, kernel.numerator[channel])
        wrong = torch.linalg.solve(system, kernel.numerator[channel])
        assert (params.numerator[channel] - right).norm() <= 1e-10 * right.norm()
        assert (params.numerator[channel] - wrong).norm() > 1e-2 * right.norm()


@torch.no_grad()
def test_taps_are_the_wrapped_impulse_response() -> None:
    kernel = with_poles(0.95, pairs=2)
    for channel in range(CHANNELS):
        numerator = np.concatenate(([0.0], kernel.numerator[channel].numpy()))
        a = np.concatenate(([1.0], kernel.denominator[channel].numpy()))
        response = np.zeros(64 * LENGTH)
        for t in range(len(response)):
            response[t] = numerator[t] if t < len(numerator) else 0.0
            for lag in range(1, min(t, len(a) - 1) + 1):
                response[t] -= a[lag] * response[t - lag]
        wrapped = torch.from_numpy(response.reshape(64, LENGTH).sum(0))
        wrapped[0] += kernel.direct[channel]
        torch.testing.assert_close(kernel(LENGTH)[channel], wrapped, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [1, 5, 63, 65])
def test_any_length_begins_the_same(length: int) -> None:
    kernel = with_poles(0.9)
    torch.testing.assert_close(kernel(length), kernel(200)[:, :length], rtol=0, atol=1e-11)


def test_zero_initialisation_is_the_identity() -> None:
    expected = torch.nn.functional.one_hot(torch.tensor(0), LENGTH).double().expand(CHANNELS, LENGTH)
    assert torch.equal(kernel_of()(LENGTH), expected)


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_montel_constraint_keeps_every_pole_inside(scale: float) -> None:
    kernel = kernel_of(state_size=12, init="xavier", constraint="montel")
    with torch.no_grad():
        kernel.denominator.mul_(scale)
    assert kernel.recurrence().largest_pole() < 1
    assert torch.isfinite(kernel(LENGTH)).all()


def test_shared_denominators_serve_channels_in_order() -> None:
    kernel = with_poles(0.9, denominators=2)
    apart = with_poles(0.9)
    with torch.no_grad():
        apart.denominator.copy_(kernel.denominator.repeat_interleave(2, dim=0))
        apart.numerator.copy_(kernel.numerator)
    torch.testing.assert_close(kernel(LENGTH), apart(LENGTH))
    torch.testing.assert_close(kernel.recurrence().numerator, apart.recurrence().numerator)


def test_settings_that_do_not_fit_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"denominators=3: must divide the 4 channels"):
        kernel_of(denominators=3)
    with pytest.raises(ConfigError, match=r"state_size=64: must be below the training length, 64"):
        kernel_of(state_size=64)


def test_a_pole_outside_the_unit_circle_is_reported_with_its_layer() -> None:
    model = CausalLM(tiny_config(kernel=RTFConfig(name="rtf", state_size=2))).eval()
    kernel = model.blocks[1].mixer.conv.kernel
    with torch.no_grad():
        kernel.numerator.fill_(0.1)
        kernel.denominator[3] = torch.tensor([0.0, 1.05**2])
    with pytest.raises(
        UserError, match=r"layer 1: the denominator has a pole of modulus 1\.05000, on or outside"
    ):
        convert_model(model, method="companion")
    # The taps within the training length are still finite.
    converted = convert_model(model, method="window")
    tokens = torch.randint(300, (1, 32))
    torch.testing.assert_close(converted(tokens), model(tokens), rtol=0, atol=1e-4)
    _, layers = convert_layers(model, ConversionConfig(method="auto", horizon=32))
    assert layers[1].method != "companion"
    assert "companion: the denominator has a pole of modulus 1.05" in layers[1].reason


def test_taps_alone_have_no_companion_form() -> None:
    with pytest.raises(UserError, match="method companion: the kernel defines no such recurrence"):
        convert_model(CausalLM(tiny_config()), method="companion")


@pytest.mark.parametrize("denominators", [None, 4])
def test_memory_of_a_training_step_does_not_depend_on_the_state_size(denominators: int | None) -> None:
    def saved_bytes(state_size: int) -> int:
        """Return the bytes that backward keeps for kernel and convolution, counting each storage once."""
        kernel = RTFKernel(RTFConfig(name="rtf", state_size=state_size, denominators=denominators), 64, 8192)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = toeplitz(torch.randn(1, 8192, 64), kernel(8192))
        y.sum().backward()
        return sum(kept.values())

    assert saved_bytes(1024) <= 1.1 * saved_bytes(16)
