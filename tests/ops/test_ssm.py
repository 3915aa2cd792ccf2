"""The recurrence: one step, prefill and the Python loop agree, warm or cold, padded or not."""

from __future__ import annotations

import pytest
import torch

from tnnlm.ops import ssm
from tnnlm.ops.reference import recurrence_loop, toeplitz_dense
from tnnlm.ops.ssm import SSMParams, SSMState

CHANNELS = 3
FORMS = {
    "shared poles": (0, 5, True),
    "poles per channel": (0, 4, False),
    "window": (6, 0, True),
    "one tap": (1, 0, True),
    "poles and window": (4, 3, True),
    "poles per channel and window": (2, 3, False),
}


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def params(request: pytest.FixtureRequest) -> SSMParams:
    """Random stable recurrences of every form."""
    window, modes, shared = FORMS[request.param]
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


def run_steps(params: SSMParams, x: torch.Tensor, state: SSMState) -> tuple[torch.Tensor, SSMState]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = ssm.step(params, x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def assert_same_state(a: SSMState, b: SSMState) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def test_step_matches_loop(params: SSMParams) -> None:
    x = torch.randn(2, 40, CHANNELS, dtype=torch.float64)
    y, _ = run_steps(params, x, ssm.init_state(params, 2))
    torch.testing.assert_close(y, recurrence_loop(params, x), rtol=0, atol=1e-11)


def test_step_convolves_with_the_effective_taps(params: SSMParams) -> None:
    x = torch.randn(2, 40, CHANNELS, dtype=torch.float64)
    y, _ = run_steps(params, x, ssm.init_state(params, 2))
    torch.testing.assert_close(y, toeplitz_dense(x, ssm.taps(params, 40)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 7, 40])
def test_prefill_matches_step_for_every_split(params: SSMParams, chunk: int) -> None:
    x = torch.randn(2, 40, CHANNELS, dtype=torch.float64)
    # Warm: something was read before.
    _, warm = run_steps(params, torch.randn(2, 13, CHANNELS, dtype=torch.float64), ssm.init_state(params, 2))
    expected, last = run_steps(params, x, warm)
    outputs, state = [], warm
    for part in x.split(chunk, dim=1):
        y, state = ssm.prefill(params, part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-11)
    assert_same_state(state, last)


def test_prefill_of_a_padded_batch_equals_single_prompts(params: SSMParams) -> None:
    x = torch.randn(4, 11, CHANNELS, dtype=torch.float64)
    lengths = torch.tensor([11, 4, 1, 0])
    _, warm = run_steps(params, torch.randn(4, 9, CHANNELS, dtype=torch.float64), ssm.init_state(params, 4))
    y, state = ssm.prefill(params, x, warm, lengths)
    for row, length in enumerate(lengths.tolist()):
        start = SSMState(*(part[row : row + 1] for part in warm))
        last = start
        if length:
            single, last = run_steps(params, x[row : row + 1, :length], start)
            torch.testing.assert_close(y[row : row + 1, :length], single, rtol=0, atol=1e-11)
        assert_same_state(SSMState(*(part[row : row + 1] for part in state)), last)


def test_step_of_an_inactive_row_is_an_identity(params: SSMParams) -> None:
    _, warm = run_steps(params, torch.randn(2, 5, CHANNELS, dtype=torch.float64), ssm.init_state(params, 2))
    x = torch.randn(2, CHANNELS, dtype=torch.float64)
    _, after = ssm.step(params, x, warm, torch.tensor([True, False]))
    _, both = ssm.step(params, x, warm)
    for kept, old, new in zip(after, warm, both, strict=True):
        assert torch.equal(kept[1], old[1])
        assert torch.equal(kept[0], new[0])


def test_step_leaves_its_arguments_alone(params: SSMParams) -> None:
    state = SSMState(*(torch.randn_like(part) for part in ssm.init_state(params, 1)))
    before = [part.clone() for part in state]
    ssm.step(params, torch.randn(1, CHANNELS, dtype=torch.float64), state)
    ssm.prefill(params, torch.randn(1, 3, CHANNELS, dtype=torch.float64), state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_rows_of_a_batch_are_independent(params: SSMParams) -> None:
    x = torch.randn(3, 20, CHANNELS, dtype=torch.float64)
    y, _ = ssm.prefill(params, x, ssm.init_state(params, 3))
    other = x.clone()
    other[1:] = torch.randn_like(other[1:])
    changed, _ = ssm.prefill(params, other, ssm.init_state(params, 3))
    assert torch.equal(changed[0], y[0])


def test_taps_in_blocks_equal_the_definition() -> None:
    poles = torch.tensor([[0.9, 0.99], [0.3, 0.0]], dtype=torch.float64)
    residues = torch.randn(CHANNELS, 2, 2, dtype=torch.float64)
    params = SSMParams(torch.randn(CHANNELS, 3, dtype=torch.float64), poles, residues)
    lags = torch.arange(5000, dtype=torch.float64)
    lam, c = torch.complex(*poles), torch.complex(residues[:, 0], residues[:, 1])
    expected = (c @ lam[:, None] ** lags).real
    expected[:, :3] += params.window
    torch.testing.assert_close(ssm.taps(params, 5000), expected, rtol=0, atol=1e-11)


def test_order_counts_real_state_numbers(params: SSMParams) -> None:
    window, modes = params.window.shape[1], params.residues.shape[2]
    # Every mode is a pair but the first, which was made real.
    assert ssm.order(params) == window + (2 * modes - 1 if modes else 0)


def test_state_bytes_are_those_of_the_state(params: SSMParams) -> None:
    state = ssm.init_state(params, 1)
    assert ssm.state_bytes(params) == sum(part.numel() * 8 for part in state)


def test_to_dtype_never_goes_below_float32(params: SSMParams) -> None:
    stored = ssm.to_dtype(params, torch.bfloat16)
    assert stored.residues.dtype == stored.window.dtype == torch.float32
    assert stored.poles.dtype == torch.float64
