"""Conversion of long convolutions in any module tree, in place or in a copy, and their steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import FAMILIES
from tnnlm.conversion import convert_model
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel, TwoSidedKernel, build_kernel
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.modules import BiConv, LongConv, RecurrentConv
from tnnlm.ops.recurrence import State

LENGTH = 48
CHANNELS = 6


def long_conv(family: str = "tno") -> LongConv:
    return LongConv(build_kernel(FAMILIES[family](), CHANNELS, LENGTH))


class Stack(nn.Module):
    """Custom module with convolutions at several depths, one of them registered twice."""

    def __init__(self, family: str = "tno") -> None:
        super().__init__()
        self.first = long_conv(family)
        self.inner = nn.ModuleDict(
            {"pair": nn.ModuleList([nn.Linear(CHANNELS, CHANNELS), long_conv(family)])}
        )
        self.again = self.first

    def convs(self) -> list[LongConv | RecurrentConv]:
        return [self.first, self.inner["pair"][1], self.again]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs():
            x = torch.tanh(conv(x))
        return x

    def step(self, x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        after = []
        for conv, state in zip(self.convs(), states, strict=True):
            y, state = conv.step(x, state)
            x = torch.tanh(y)
            after.append(state)
        return x, after


@pytest.mark.parametrize(
    ("family", "method"),
    [("tno", "etsc"), ("sgconv", "window"), ("rtf", "companion"), ("sgconv", "multirate")],
)
@torch.no_grad()
def test_converted_modules_of_a_users_model_match_its_parallel_form(family: str, method: str) -> None:
    model = Stack(family).double()
    x = torch.randn(2, LENGTH, CHANNELS, dtype=torch.float64)
    expected = model(x)
    converted = convert_model(model, method=method, horizon=LENGTH)
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-6)
    states = [conv.init_state(2) for conv in converted.convs()]
    outputs = []
    for t in range(LENGTH):
        y, states = converted.step(x[:, t], states)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_steps_continue_from_the_state_of_prefill() -> None:
    model = nn.Sequential(long_conv()).double()
    x = torch.randn(2, LENGTH, CHANNELS, dtype=torch.float64)
    conv = convert_model(model, horizon=LENGTH)[0]
    assert isinstance(conv, RecurrentConv)
    y, state = conv.prefill(x[:, :-1], conv.init_state(2))
    last, _ = conv.step(x[:, -1], state)
    torch.testing.assert_close(torch.cat([y, last[:, None]], 1), model(x), rtol=0, atol=1e-6)


def test_a_copy_leaves_the_model_alone_and_in_place_changes_it() -> None:
    model = Stack().train()
    copy = convert_model(model, horizon=LENGTH)
    assert isinstance(model.first, LongConv)
    assert model.training
    assert copy is not model
    assert all(isinstance(conv, RecurrentConv) for conv in copy.convs())
    linear = model.inner["pair"][0]  # type: ignore[index]
    assert convert_model(model, horizon=LENGTH, inplace=True) is model
    assert model.inner["pair"][0] is linear  # type: ignore[index]
    assert len(recurrences(model)) == 2
    assert not model.training


def test_a_convolution_in_two_places_is_converted_once() -> None:
    model = Stack()
    assert len(kernels(model)) == 2
    converted = convert_model(model, horizon=LENGTH)
    assert converted.first is converted.again
    assert len(recurrences(converted)) == 2


def test_a_bidirectional_convolution_is_not_converted() -> None:
    both = TwoSidedKernel(FAMILIES["tno"](), CHANNELS, LENGTH)
    converted = convert_model(nn.Sequential(BiConv(both), long_conv()), horizon=LENGTH)
    assert [type(module) for module in converted] == [BiConv, RecurrentConv]


class Forever(Kernel):
    """Kernel that never decays."""

    n_channels = 1

    def forward(self, length: int) -> Tensor:
        return torch.ones(1, length)


def test_training_length_is_required_where_a_kernel_never_decays() -> None:
    model = nn.Sequential(LongConv(Forever()))
    with pytest.raises(UserError, match=r"layer 0: .* set max_length"):
        convert_model(model)
    converted = convert_model(model, max_length=LENGTH)
    torch.testing.assert_close(converted(torch.ones(1, 5, 1)).flatten(), torch.arange(1.0, 6.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential contains no LongConv"),
        (lambda: long_conv(), "a LongConv alone"),
        (lambda: convert_model(Stack(), horizon=LENGTH), "already converted"),
    ],
)
def test_modules_that_cannot_be_converted_are_refused_in_one_line(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        convert_model(make())
    assert "\n" not in str(raised.value)
