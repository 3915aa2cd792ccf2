"""The multirate recurrence: exact at every length, in any split, for any rows, and after many tokens."""

from __future__ import annotations

import pytest
import torch

from tnnlm.kernels import SGConvConfig, SGConvKernel
from tnnlm.ops import multirate as op
from tnnlm.ops import recurrence
from tnnlm.ops.hats import far_outputs
from tnnlm.ops.multirate import MultirateParams, MultirateState
from tnnlm.ops.reference import toeplitz_dense

CHANNELS = 3
SHAPES = [  # length, knots, and the balance that sets the number of latest inputs
    (33, 8, 8),
    (33, 8, 0.1),
    (64, 4, 0.1),
    (61, 4, 0.1),
    (37, 1, 0.1),
    (96, 3, 0.1),
    (77, 3, 0.1),
    (63, 2, 0.1),
    (200, 7, 1),
    (256, 16, 8),
    (5, 4, 8),
    (1, 1, 8),
]
"""Lengths that are whole scales, that end in one, and that have no scale beyond the latest inputs."""


def kernel_of(length: int, knots: int, dtype: torch.dtype = torch.float64) -> SGConvKernel:
    config = SGConvConfig(name="sgconv", kernel_dim=knots, length=length, decay_max=3.0)
    kernel = SGConvKernel(config, CHANNELS, length).to(dtype)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return kernel.requires_grad_(False)


def params_of(length: int, knots: int, dtype: torch.dtype = torch.float64) -> MultirateParams:
    return kernel_of(length, knots, dtype).recurrence()


def run_steps(
    params: MultirateParams, x: torch.Tensor, state: MultirateState
) -> tuple[torch.Tensor, MultirateState]:
    outputs = []
    for token in x.unbind(1):
        y, state = params.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def row_of(state: MultirateState, row: int) -> MultirateState:
    parts = recurrence.named_tensors(state).values()
    return recurrence.with_tensors(state, (part[row : row + 1] for part in parts))


def assert_same(a: MultirateState, b: MultirateState) -> None:
    left, right = (recurrence.named_tensors(state) for state in (a, b))
    assert [*left] == [*right]
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "knots", "balance"), SHAPES)
def test_steps_and_prefill_equal_the_dense_convolution(
    length: int, knots: int, balance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_BALANCE", balance)
    monkeypatch.setattr(op, "_CACHE_LINE", 1)
    monkeypatch.setattr(op, "_LEAST_INPUTS", 1)
    kernel = kernel_of(length, knots)
    params = kernel.recurrence()
    params.check()
    torch.testing.assert_close(params.taps(length + 9), kernel(length + 9), rtol=0, atol=1e-14)
    x = torch.randn(2, 3 * length + 20, CHANNELS, dtype=torch.float64)
    expected = toeplitz_dense(x, kernel(x.shape[1]))
    y, last = run_steps(params, x, params.init_state(2))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for chunk in (1, 2, 7, x.shape[1]):
        state, outputs = params.init_state(2), []
        for part in x.split(chunk, dim=1):
            y, state = params.prefill(part, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-12)
        assert_same(state, last)


@pytest.mark.parametrize(("length", "knots"), [(200, 7), (33, 8)])
def test_rows_at_different_positions_equal_single_rows(
    length: int, knots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_CACHE_LINE", 1)
    monkeypatch.setattr(op, "_LEAST_INPUTS", 1)
    params = params_of(length, knots)
    lengths = torch.tensor([3, 0, 50, 31])
    x = torch.randn(4, 50, CHANNELS, dtype=torch.float64)
    y, state = params.prefill(x, params.init_state(4), lengths)
    singles = []
    for row, count in enumerate(lengths.tolist()):
        single = params.init_state(1)
        if count:
            outputs, single = run_steps(params, x[row : row + 1, :count], single)
            torch.testing.assert_close(y[row : row + 1, :count], outputs, rtol=0, atol=1e-12)
        assert_same(row_of(state, row), single)
        singles.append(single)
    for turn in range(2 * len(params.near)):
        token = torch.randn(4, CHANNELS, dtype=torch.float64)
        active = torch.tensor([True, turn % 3 > 0, True, turn % 2 == 0])
        y, state = params.step(token, state, active)
        for row in active.nonzero().flatten().tolist():
            single, singles[row] = params.step(token[row : row + 1], singles[row])
            torch.testing.assert_close(y[row], single[0], rtol=0, atol=1e-12)
    for row, single in enumerate(singles):
        assert_same(row_of(state, row), single)


def test_states_are_not_changed_by_later_tokens() -> None:
    params = params_of(64, 4)
    _, state = params.prefill(torch.randn(2, 70, CHANNELS).double(), params.init_state(2))
    before = [part.clone() for part in recurrence.named_tensors(state).values()]
    x = torch.randn(2, 40, CHANNELS, dtype=torch.float64)
    first, _ = run_steps(params, x, state)
    run_steps(params, -x, state)
    after = recurrence.named_tensors(state).values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(run_steps(params, x, state)[0], first)


def test_no_error_grows_in_100_000_tokens() -> None:
    params = params_of(61, 4, torch.float32)
    exact = params.to_dtype(torch.float64)
    _, state = params.prefill(torch.randn(1, 100_000 - 200, CHANNELS), params.init_state(1))
    # The state of a step depends on the latest inputs only, bit by bit.
    x = torch.randn(1, 400, CHANNELS)
    outputs, state = run_steps(params, x, state)
    expected = toeplitz_dense(x.double(), exact.taps(400))[:, 61:]
    torch.testing.assert_close(outputs[:, 61:].double(), expected, rtol=0, atol=1e-5)
    _, fresh = run_steps(params, x[:, -(int(state.clock[0, 0]) + 128) :], params.init_state(1))
    assert torch.equal(state.in_order(), fresh.in_order())
    assert all(
        torch.equal(getattr(state, name), getattr(fresh, name)) for name in ("recent", "ahead", "coming")
    )


def test_many_steps_stay_exact() -> None:
    params = MultirateParams(*(part[..., :1] for part in params_of(33, 2, torch.float32)))
    state = params.init_state(1)
    x = torch.randn(1, 100_000, 1)
    with torch.inference_mode():
        for token in x.unbind(1):
            y, state = params.step(token, state)
    expected = (params.taps(33) * x[:, -33:].flip(1).transpose(1, 2)[0].double()).sum()
    assert abs(y.item() - expected.item()) < 1e-6


def test_a_long_kernel_takes_a_state_of_its_length_and_a_fifth_of_the_operations() -> None:
    params = params_of(8192, 16, torch.float32)
    assert params.order() <= 1.1 * 8191
    assert params.multiply_adds() <= 8192 * CHANNELS / 5
    assert recurrence.state_bytes(params) <= 1.1 * 4 * 8191 * CHANNELS
    assert params.largest_pole() == 0


def test_channels_and_tiles_give_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SGConvConfig(name="sgconv", kernel_dim=4, length=61)
    params = SGConvKernel(config, 40, 61).double().requires_grad_(False).recurrence()
    past = torch.randn(2, 60, 40, dtype=torch.float64)
    whole = far_outputs(params._scales(), past, 8)
    monkeypatch.setattr("tnnlm.ops.hats._TILE_BYTES", 1)
    monkeypatch.setattr("tnnlm.ops.hats._LEAST_CHANNELS", 3)
    assert torch.equal(far_outputs(params._scales(), past, 8), whole)
    some = params.channels_of(slice(3, 7))
    torch.testing.assert_close(some.taps(70), params.taps(70)[3:7])


def test_from_tensors_refuses_shapes_of_no_kernel() -> None:
    good = params_of(200, 7)._asdict()
    assert isinstance(recurrence.from_tensors(good), MultirateParams)
    for name, part in (
        ("near", torch.zeros(9, CHANNELS)),
        ("near", torch.zeros(56, CHANNELS + 1)),
        ("near", torch.zeros(0, CHANNELS)),
        ("knots", torch.zeros(2, 0, CHANNELS)),
        ("knots", torch.zeros(40, 7, CHANNELS)),
        ("cut", torch.zeros(9, CHANNELS)),
        ("tail", torch.zeros(CHANNELS)),
    ):
        with pytest.raises(ValueError, match="shapes near"):
            recurrence.from_tensors({**good, name: part})


def test_stored_dtype_is_at_least_float32() -> None:
    params = params_of(61, 4).to_dtype(torch.bfloat16)
    assert all(part.dtype == torch.float32 for part in params)
    assert all(
        part.dtype == torch.float32 for part in recurrence.named_tensors(params.init_state(1)).values()
    )


@pytest.mark.parametrize(
    ("place", "value"), [(0, -1), (0, 10**6), (1, -2), (1, 10**6), (2, 99), (0, 0.5), (2, float("nan"))]
)
def test_an_impossible_clock_is_refused(place: int, value: float) -> None:
    ahead = torch.zeros(1, 4, 3)
    clock = torch.tensor([[3.0, 3.0, 1.0]])
    state = MultirateState(torch.zeros(1, 8, 3), (ahead, ahead), ahead, ahead, clock)
    state.check()
    state.clock[0, place] = value
    with pytest.raises(ValueError, match="clock"):
        state.check()


@pytest.mark.parametrize("length", [3, 61])
def test_the_clocks_of_sequences_are_accepted(length: int) -> None:
    params = params_of(length, 4)
    state = params.init_state(2)
    state.check()
    run_steps(params, torch.randn(2, 40, CHANNELS, dtype=torch.float64), state)[1].check()
