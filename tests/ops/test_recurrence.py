"""The recurrence: steps, prefill and a Python loop agree from any initial state and with padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tnnlm.ops import recurrence, ssm_blocks
from tnnlm.ops.companion import CompanionParams, rational_series
from tnnlm.ops.division import pole_radius
from tnnlm.ops.recurrence import Params, State
from tnnlm.ops.reference import recurrence_loop, toeplitz_dense
from tnnlm.ops.ssm import SSMParams

CHANNELS = 3
FORMS = {
    "shared poles": (0, 5, True),
    "poles per channel": (0, 4, False),
    "window": (6, 0, True),
    "one tap": (1, 0, True),
    "poles and window": (4, 3, True),
    "poles per channel and window": (2, 3, False),
}
COMPANIONS = {"companion": CHANNELS, "companion, shared denominator": 1}


@pytest.fixture(params=[*FORMS, *COMPANIONS], ids=lambda name: name.replace(" ", "-"))
def params(request: pytest.FixtureRequest) -> Params:
    """Return random stable recurrences of every type."""
    if request.param in COMPANIONS:
        return random_companion(COMPANIONS[request.param])
    return random_modes(*FORMS[request.param])


def random_companion(denominators: int, order: int = 5) -> CompanionParams:
    a = torch.randn(denominators, order, dtype=torch.float64)
    # Coefficients whose moduli sum to less than 1 keep the roots inside the unit circle.
    a = 0.95 * a / a.abs().sum(1, keepdim=True)
    numerator = torch.randn(CHANNELS, order, dtype=torch.float64)
    return CompanionParams(torch.randn(CHANNELS, dtype=torch.float64), numerator, a)


def random_modes(window: int, modes: int, shared: bool) -> SSMParams:
    lead = () if shared else (CHANNELS,)
    radius = 0.7 + 0.29 * torch.rand(*lead, modes, dtype=torch.float64)
    angle = 3 * torch.rand(*lead, modes, dtype=torch.float64)
    poles = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-2)
    if modes:
        poles[..., 1, 0] = 0  # one real pole
    return SSMParams(
        torch.randn(CHANNELS, window, dtype=torch.float64),
        poles,
        torch.randn(CHANNELS, 2, modes, dtype=torch.float64),
    )


def run_steps(params: Params, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = params.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def assert_same_state(a: State, b: State) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def test_step_matches_loop(params: Params) -> None:
    x = torch.randn(2, 40, CHANNELS, dtype=torch.float64)
    y, _ = run_steps(params, x, params.init_state(2))
    torch.testing.assert_close(y, recurrence_loop(params, x), rtol=0, atol=1e-11)


def test_step_convolves_with_the_effective_taps(params: Params) -> None:
    x = torch.randn(2, 40, CHANNELS, dtype=torch.float64)
    y, _ = run_steps(params, x, params.init_state(2))
    torch.testing.assert_close(y, toeplitz_dense(x, params.taps(40)), rtol=0, atol=1e-11)


@pytest.fixture(params=[None, (4, 24)], ids=["one-block", "short-blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process modes as one block, or in spans of three blocks of eight tokens."""
    if request.param:
        monkeypatch.setattr(ssm_blocks, "_SMALL_BLOCK", request.param[0])
        monkeypatch.setattr(ssm_blocks, "_FFT_BLOCK", request.param[1])


@pytest.mark.parametrize("chunk", [1, 2, 7, 40])
@pytest.mark.usefixtures("blocks")
def test_prefill_matches_step_for_every_split(params: Params, chunk: int) -> None:
    x = torch.randn(2, 40, CHANNELS, dtype=torch.float64)
    # The state is non-zero, because other tokens were processed before.
    _, warm = run_steps(params, torch.randn(2, 13, CHANNELS, dtype=torch.float64), params.init_state(2))
    expected, last = run_steps(params, x, warm)
    outputs, state = [], warm
    for part in x.split(chunk, dim=1):
        y, state = params.prefill(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-11)
    assert_same_state(state, last)


@pytest.mark.usefixtures("blocks")
def test_prefill_of_a_padded_batch_equals_single_prompts(params: Params) -> None:
    x = torch.randn(5, 31, CHANNELS, dtype=torch.float64)
    lengths = torch.tensor([31, 26, 8, 1, 0])
    _, warm = run_steps(params, torch.randn(5, 9, CHANNELS, dtype=torch.float64), params.init_state(5))
    y, state = params.prefill(x, warm, lengths)
    for row, length in enumerate(lengths.tolist()):
        start = type(warm)(*(part[row : row + 1] for part in warm))
        last = start
        if length:
            single, last = run_steps(params, x[row : row + 1, :length], start)
            torch.testing.assert_close(y[row : row + 1, :length], single, rtol=0, atol=1e-11)
        assert_same_state(type(warm)(*(part[row : row + 1] for part in state)), last)


def test_prefill_follows_a_change_of_the_parameters() -> None:
    params = random_modes(0, 5, True)
    x = torch.randn(1, 9, CHANNELS, dtype=torch.float64)
    params.prefill(x, params.init_state(1))
    params.residues.mul_(2)
    params.poles.mul_(0.5)
    y, _ = params.prefill(x, params.init_state(1))
    torch.testing.assert_close(y, recurrence_loop(params, x), rtol=0, atol=1e-11)


def test_step_of_an_inactive_row_is_an_identity(params: Params) -> None:
    _, warm = run_steps(params, torch.randn(2, 5, CHANNELS, dtype=torch.float64), params.init_state(2))
    x = torch.randn(2, CHANNELS, dtype=torch.float64)
    _, after = params.step(x, warm, torch.tensor([True, False]))
    _, both = params.step(x, warm)
    for kept, old, new in zip(after, warm, both, strict=True):
        assert torch.equal(kept[1], old[1])
        assert torch.equal(kept[0], new[0])


def test_step_leaves_its_arguments_alone(params: Params) -> None:
    empty = params.init_state(1)
    state = type(empty)(*(torch.randn_like(part) for part in empty))
    before = [part.clone() for part in state]
    params.step(torch.randn(1, CHANNELS, dtype=torch.float64), state)
    params.prefill(torch.randn(1, 3, CHANNELS, dtype=torch.float64), state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_rows_of_a_batch_are_independent(params: Params) -> None:
    x = torch.randn(3, 20, CHANNELS, dtype=torch.float64)
    y, _ = params.prefill(x, params.init_state(3))
    other = x.clone()
    other[1:] = torch.randn_like(other[1:])
    changed, _ = params.prefill(other, params.init_state(3))
    assert torch.equal(changed[0], y[0])


def test_taps_in_blocks_equal_the_definition() -> None:
    poles = torch.tensor([[0.9, 0.99], [0.3, 0.0]], dtype=torch.float64)
    residues = torch.randn(CHANNELS, 2, 2, dtype=torch.float64)
    params = SSMParams(torch.randn(CHANNELS, 3, dtype=torch.float64), poles, residues)
    lags = torch.arange(5000, dtype=torch.float64)
    lam, c = torch.complex(*poles), torch.complex(residues[:, 0], residues[:, 1])
    expected = (c @ lam[:, None] ** lags).real
    expected[:, :3] += params.window
    torch.testing.assert_close(params.taps(5000), expected, rtol=0, atol=1e-11)


def test_order_counts_real_state_numbers(params: Params) -> None:
    if isinstance(params, CompanionParams):
        assert params.order() == 5
        return
    window, modes = params.window.shape[1], params.residues.shape[2]
    # Every mode is a conjugate pair, except for the first, which is real.
    assert params.order() == window + (2 * modes - 1 if modes else 0)


def test_state_bytes_are_those_of_the_state(params: Params) -> None:
    state = params.init_state(1)
    assert recurrence.state_bytes(params) == sum(part.numel() * 8 for part in state)


def test_to_dtype_never_goes_below_float32(params: Params) -> None:
    stored = params.to_dtype(torch.bfloat16)
    for name, part in stored._asdict().items():
        assert part.dtype == (torch.float64 if name == "poles" else torch.float32)


def test_channels_of_is_the_recurrence_of_some(params: Params) -> None:
    some = params.channels_of(slice(1, 3))
    torch.testing.assert_close(some.taps(30), params.taps(30)[1:3])


def test_from_tensors_detects_the_type(params: Params) -> None:
    found = recurrence.from_tensors({**params._asdict(), "other": torch.zeros(1)})
    assert type(found) is type(params)
    assert all(torch.equal(a, b) for a, b in zip(found, params, strict=True))
    with pytest.raises(KeyError, match="poles"):
        recurrence.from_tensors({"poles": torch.zeros(1)})


@pytest.mark.parametrize("order", [1, 2, 5, 16])
def test_pole_radius_is_that_of_the_roots(order: int) -> None:
    a = torch.randn(20, order, dtype=torch.float64)
    roots = [np.roots(np.concatenate(([1.0], row))) for row in a.numpy()]
    expected = torch.tensor([np.abs(r).max() for r in roots])
    torch.testing.assert_close(pole_radius(a), expected, rtol=1e-6, atol=1e-8)


def test_pole_radius_without_poles_is_zero() -> None:
    assert pole_radius(torch.zeros(1, 4)).item() < 1e-8


@pytest.mark.parametrize("radius", [0.5, 0.999, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 100, 1000])
def test_rational_series_is_long_division(radius: float, length: int) -> None:
    # Poles at angles 0.5 and 2, and numerators shorter and longer than the requested length.
    a = np.convolve([1, -2 * radius * np.cos(0.5), radius**2], [1, -2 * radius * np.cos(2), radius**2])
    c = np.array([0.3, -1.0, 0.5])
    expected, rest = [], np.concatenate((c, np.zeros(length + len(a))))
    for i in range(length):
        expected.append(rest[i])
        rest[i : i + len(a)] -= expected[-1] * a
    found = rational_series(torch.from_numpy(c)[None], torch.from_numpy(a[1:])[None], length)
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=0, atol=1e-10)
