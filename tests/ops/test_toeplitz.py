"""FFT products equal dense ones in outputs and gradients (invariants 1 and 2 of CONTRIBUTING.md)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tnnlm.ops.reference import toeplitz_dense, toeplitz_two_sided_dense
from tnnlm.ops.toeplitz import fft_length, toeplitz, toeplitz_two_sided

LENGTHS = (1, 2, 7, 63, 64, 100)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("taps", ["equal", "shorter", "longer"])
def test_toeplitz_matches_dense_product(length: int, taps: str) -> None:
    n_taps = {"equal": length, "shorter": max(1, length // 2), "longer": length + 5}[taps]
    assert_equal_with_gradients(toeplitz, toeplitz_dense, length, n_taps)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("taps", ["equal", "shorter", "longer"])
def test_two_sided_toeplitz_matches_dense_product(length: int, taps: str) -> None:
    side = {"equal": length, "shorter": max(1, length // 2), "longer": length + 5}[taps]
    assert_equal_with_gradients(toeplitz_two_sided, toeplitz_two_sided_dense, length, 2 * side - 1)


def assert_equal_with_gradients(
    fast_op: Callable[..., torch.Tensor], slow_op: Callable[..., torch.Tensor], length: int, n_taps: int
) -> None:
    x = torch.randn(3, length, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(4, n_taps, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, length, 4, dtype=torch.float64)
    fast, slow = fast_op(x, k), slow_op(x, k)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad((fast * weight).sum(), (x, k)),
        torch.autograd.grad((slow * weight).sum(), (x, k)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_two_sided_toeplitz_without_future_lags_is_the_causal_one() -> None:
    x, k = torch.randn(2, 37, 3, dtype=torch.float64), torch.randn(3, 37, dtype=torch.float64)
    both = torch.nn.functional.pad(k, (36, 0))
    torch.testing.assert_close(toeplitz_two_sided(x, both), toeplitz(x, k), rtol=0, atol=1e-12)


def test_zeros_of_padding_reach_no_output() -> None:
    x, k = torch.randn(2, 29, 3, dtype=torch.float64), torch.randn(3, 57, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 12))
    torch.testing.assert_close(
        toeplitz_two_sided(padded, k)[:, :29], toeplitz_two_sided(x, k), rtol=0, atol=1e-12
    )


def test_two_sided_toeplitz_refuses_an_even_number_of_taps() -> None:
    with pytest.raises(ValueError, match="k has 6 taps: expected an odd number"):
        toeplitz_two_sided(torch.zeros(1, 4, 2), torch.zeros(2, 6))


@pytest.mark.parametrize("frozen", ["x", "k"])
def test_toeplitz_gradient_of_one_argument_alone(frozen: str) -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=frozen != "x")
    k = torch.randn(3, 9, dtype=torch.float64, requires_grad=frozen != "k")
    wanted = k if frozen == "x" else x
    (fast,) = torch.autograd.grad(toeplitz(x, k).square().sum(), wanted)
    (slow,) = torch.autograd.grad(toeplitz_dense(x, k).square().sum(), wanted)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("product", "dense"), [(toeplitz, toeplitz_dense), (toeplitz_two_sided, toeplitz_two_sided_dense)]
)
def test_toeplitz_runs_in_float32_and_keeps_the_dtype(
    dtype: torch.dtype, product: Callable[..., torch.Tensor], dense: Callable[..., torch.Tensor]
) -> None:
    x = torch.randn(2, 50, 3).to(dtype)
    k = torch.randn(3, 51)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = product(x, k)
    assert y.dtype == dtype
    # The result is rounded once, to the dtype of the output.
    expected = dense(x.double(), k.double())
    torch.testing.assert_close(
        y.double(), expected.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
    )


def test_toeplitz_is_causal() -> None:
    x = torch.randn(1, 200, 2)
    k = torch.randn(2, 200)
    changed = x.clone()
    changed[:, 120:] += 100
    difference = (toeplitz(changed, k) - toeplitz(x, k))[:, :120].abs().max()
    # FFT round-off grows with the largest input, and is no leakage from the future.
    assert difference < 1e-6 * 100 * k.abs().sum(1).max()


@pytest.mark.parametrize(
    "shapes", [((2, 5), (3, 5)), ((1, 5, 2), (3, 5)), ((1, 0, 3), (3, 5)), ((1, 5, 3), (3, 0))]
)
def test_toeplitz_refuses_wrong_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"expected|at least"):
        toeplitz(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_fft_length_is_the_smallest_smooth_even_size() -> None:
    def smooth(n: int) -> bool:
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    for minimum in range(1, 700):
        expected = next(n for n in range(minimum, 2 * minimum + 2) if n % 2 == 0 and smooth(n))
        assert fft_length(minimum) == expected
