"""The companion form where its numbers are badly scaled: clustered poles, every order, padding, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.reference import reference
from tnnlm.ops.companion import CompanionParams, CompanionState
from tnnlm.ops.division import divide

CASES = range(4)
"""Transfer functions of the reference case, of order 4, 6, 8 and 4."""
ROUNDING = 1e-6
"""Tolerance relative to the outputs: float64 steps themselves are off by up to 1e-8 on these cases."""


def clustered(case: int) -> tuple[CompanionParams, dict[str, Tensor]]:
    """Return a recurrence whose poles lie close together, and its inputs, outputs and taps in 60 digits."""
    tensors, _ = reference("companion_clustered_poles")
    parts = {name: tensors[f"{case}.{name}"] for name in ("denominator", "numerator", "taps", "x", "y")}
    zero = torch.zeros(1, dtype=torch.float64)
    return CompanionParams(zero, parts["numerator"][None], parts["denominator"][None]), parts


def random_params(order: int, channels: int = 4, denominators: int = 2) -> CompanionParams:
    a = torch.randn(denominators, order, dtype=torch.float64)
    a = 0.95 * a / a.abs().sum(1, keepdim=True)
    return CompanionParams(torch.randn(channels).double(), torch.randn(channels, order).double(), a)


def run_steps(params: CompanionParams, x: Tensor, state: CompanionState) -> tuple[Tensor, CompanionState]:
    outputs = []
    for token in x.unbind(1):
        y, state = params.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def run_chunks(
    params: CompanionParams, x: Tensor, state: CompanionState, chunk: int
) -> tuple[Tensor, CompanionState]:
    outputs = []
    for part in x.split(chunk, dim=1):
        y, state = params.prefill(part, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the distance relative to ``expected``."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_taps_and_outputs_with_clustered_poles_equal_those_in_60_digits(case: int) -> None:
    params, expected = clustered(case)
    assert distance(params.taps(1024)[0], expected["taps"]) <= ROUNDING
    y, _ = params.prefill(expected["x"][None, :, None], params.init_state(1))
    assert distance(y[0, :, 0], expected["y"]) <= ROUNDING


@pytest.mark.parametrize("case", CASES)
def test_prefill_with_clustered_poles_equals_steps_in_any_split(case: int) -> None:
    params, case_tensors = clustered(case)
    x = case_tensors["x"][None, :, None]
    expected, last = run_steps(params, x, params.init_state(1))
    for chunk in (1, 7, 64, 1024):
        y, state = run_chunks(params, x, params.init_state(1), chunk)
        assert distance(y, expected) <= ROUNDING
        assert distance(state.recent, last.recent) <= ROUNDING


@pytest.mark.parametrize("order", [1, 4, 16, 64, 200])
def test_prefill_of_every_order_equals_steps_in_any_split(order: int) -> None:
    params = random_params(order)
    x = torch.randn(2, 101, 4, dtype=torch.float64)
    _, warm = run_steps(params, torch.randn(2, 13, 4, dtype=torch.float64), params.init_state(2))
    expected, last = run_steps(params, x, warm)
    for chunk in (1, 2, 7, 101):
        y, state = run_chunks(params, x, warm, chunk)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(state.recent, last.recent, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", [1, 3, 32, 1000])
def test_quotient_is_the_same_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnnlm.ops.division._BLOCK", block)
    a = random_params(9).denominator
    x, past = torch.randn(2, 3, 131, dtype=torch.float64), torch.randn(2, 3, 9, dtype=torch.float64)
    values = [*past.unbind(2)]
    for t in range(131):
        values.append(x[..., t] - sum(a[:, i - 1, None] * values[-i] for i in range(1, 10)))
    torch.testing.assert_close(divide(x, a, past), torch.stack(values[9:], dim=2), rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_padding_after_a_short_row_leaves_its_state_exact(case: int) -> None:
    """Rounding relative to the values of w in the padding, up to 1e8, would grow again from that state."""
    params, _ = clustered(case)
    x, lengths = torch.randn(3, 501, 1, dtype=torch.float64), torch.tensor([501, 7, 1])
    y, state = params.prefill(x, params.init_state(3), lengths)
    for row, length in enumerate(lengths.tolist()):
        single, last = run_steps(params, x[row : row + 1, :length], params.init_state(1))
        assert distance(state.recent[row : row + 1], last.recent) <= ROUNDING
        assert (y[row, :length] - single[0]).abs().max() <= ROUNDING * y[row].abs().max()


@pytest.mark.parametrize("order", [3, 40])
def test_prefill_with_a_float32_state_equals_steps(order: int) -> None:
    params = random_params(order).to_dtype(torch.float32)
    x, lengths = torch.randn(3, 65, 4), torch.tensor([65, 30, 1])
    _, warm = params.prefill(torch.randn(3, 9, 4), params.init_state(3))
    y, state = params.prefill(x, warm, lengths)
    assert y.dtype == state.recent.dtype == torch.float32
    for row, length in enumerate(lengths.tolist()):
        start = CompanionState(warm.recent[row : row + 1])
        expected, last = run_steps(params, x[row : row + 1, :length], start)
        torch.testing.assert_close(y[row : row + 1, :length], expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(state.recent[row : row + 1], last.recent, rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", [1, 5])
def test_gradients_of_prefill_are_those_of_steps(order: int) -> None:
    params, x = random_params(order), torch.randn(2, 75, 4, dtype=torch.float64)
    recent = torch.randn(2, 4, order, dtype=torch.float64)
    weight = torch.randn(2, 75, 4, dtype=torch.float64)
    inputs = [part.requires_grad_() for part in (*params, x, recent)]

    def gradients(prefill: bool) -> tuple[Tensor, ...]:
        state = CompanionState(recent)
        y, after = params.prefill(x, state) if prefill else run_steps(params, x, state)
        return torch.autograd.grad((y * weight).sum() + after.recent.square().sum(), inputs)

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_taps_are_those_of_the_impulse_response() -> None:
    params = random_params(6)
    impulse = torch.zeros(1, 50, 4, dtype=torch.float64)
    impulse[:, 0] = 1
    inputs, weight = [part.requires_grad_() for part in params], torch.randn(4, 50, dtype=torch.float64)
    response = run_steps(params, impulse, params.init_state(1))[0][0].T
    expected = torch.autograd.grad((response * weight).sum(), inputs)
    found = torch.autograd.grad((params.taps(50) * weight).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
