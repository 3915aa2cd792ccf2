"""Every backend of a convolution with gradients computes the same, and a device uses the best that works."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.bytes_moved import bytes_per_element
from tnnlm.ops import conv_backends, row_windows
from tnnlm.ops.conv_backends import _by_windows, _check, training_backend, use_backend
from tnnlm.ops.reference import toeplitz_dense, toeplitz_two_sided_dense
from tnnlm.ops.toeplitz import toeplitz, toeplitz_two_sided
from tnnlm.ops.triton_probe import why_it_fails

LENGTHS = (1, 2, 7, 63, 64, 100, 1000)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradients(
    product: Product, x: torch.Tensor, k: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    y = product(x, k)
    return y, *torch.autograd.grad((y * weight).sum(), (x, k))


def case(
    batch: int, length: int, taps: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs (B, L, 3) in the layout of the model, taps, and weights of the outputs."""
    x, weight = (
        torch.randn(2, 3, batch, length, dtype=torch.float64).to(dtype).transpose(1, 3).transpose(1, 2)
    )
    return x.requires_grad_(), torch.randn(3, taps, dtype=torch.float64, requires_grad=True), weight


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("product", "dense"), [(toeplitz, toeplitz_dense), (toeplitz_two_sided, toeplitz_two_sided_dense)]
)
def test_windows_match_dense_product(product: Product, dense: Product, length: int) -> None:
    for taps in (length, length // 2 + 1, length + 5):
        inputs = case(3, length, taps if product is toeplitz else 2 * taps - 1)
        with use_backend("windows"):
            got = gradients(product, *inputs)
        for left, right in zip(got, gradients(dense, *inputs), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 2, row_windows.ROWS, row_windows.ROWS + 1, 2 * row_windows.ROWS + 3])
def test_windows_match_dense_product_in_batches_of_any_size(batch: int) -> None:
    inputs = case(batch, 9, 9)
    with use_backend("windows"):
        got = gradients(toeplitz, *inputs)
    for left, right in zip(got, gradients(toeplitz_dense, *inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_windows_round_once_and_keep_the_layout(dtype: torch.dtype, layout: str) -> None:
    x, k, weight = case(5, 50, 50, dtype)
    if layout == "channels last":
        x = x.detach().contiguous().requires_grad_()
    taps = k.detach().float().requires_grad_()
    with use_backend("windows"), torch.autocast("cpu", dtype=torch.bfloat16):
        y, *grads = gradients(toeplitz, x, taps, weight)
    assert (y.dtype, y.stride(), grads[0].dtype) == (dtype, x.stride(), dtype)
    exact = gradients(toeplitz_dense, x.detach().double().requires_grad_(), k, weight.double())
    for got, expected in zip((y.detach(), *grads), exact, strict=True):
        rounded = expected.to(got.dtype).double()
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got.double(), rounded, rtol=2 * eps, atol=1e-6 * float(expected.detach().abs().max())
        )


def test_rounding_errors_of_a_row_stay_in_its_group() -> None:
    inputs = case(row_windows.ROWS + 1, 64, 64, torch.float32)
    with torch.no_grad():
        inputs[0][0] *= 1e20
    with use_backend("windows"):
        y = toeplitz(inputs[0], inputs[1])
    expected = toeplitz_dense(inputs[0].double(), inputs[1])
    torch.testing.assert_close(y[-1].double(), expected[-1], rtol=0, atol=1e-4)


def test_products_without_gradients_keep_rows_apart() -> None:
    x, k, _ = case(3, 16, 16)
    with use_backend("windows"), torch.no_grad():
        y = toeplitz(x, k)
        x[0] = float("nan")
        torch.testing.assert_close(toeplitz(x, k)[1:], y[1:], rtol=0, atol=0)


def test_compiled_windows_equal_eager_ones() -> None:
    inputs = case(3, 20, 20)
    with use_backend("windows"):
        compiled = torch.compile(lambda x, k: toeplitz(x, k), backend="aot_eager", fullgraph=True)
        for left, right in zip(gradients(compiled, *inputs), gradients(toeplitz, *inputs), strict=True):
            assert torch.equal(left, right)


def test_one_convolution_moves_few_bytes() -> None:
    before = bytes_per_element("tiles", torch.float32, channels_first=True, distinct=False)
    now = bytes_per_element("windows", torch.float32, channels_first=True, distinct=False)
    assert now <= 120 < before
    assert bytes_per_element("windows", torch.bfloat16, channels_first=True, distinct=True) <= 120


@pytest.fixture
def fresh_check() -> Iterator[None]:
    conv_backends.why_no_cudnn.cache_clear()
    yield
    conv_backends.why_no_cudnn.cache_clear()


def test_cpu_uses_tiles() -> None:
    assert training_backend(torch.device("cpu"), causal=True) == "tiles"


@pytest.mark.usefixtures("fresh_check")
def test_gpu_uses_cudnn_only_if_its_results_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return toeplitz(x.transpose(1, 2), k).transpose(1, 2)

    def wrong(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return right(x, k.flip(1))

    cpu = torch.device("cpu")
    monkeypatch.setattr(conv_backends, "find_spec", lambda name: name)
    for function, reason in ((right, ""), (wrong, "cuDNN: the results are wrong")):
        module = SimpleNamespace(ops=SimpleNamespace(fft_causal_conv1d=function))
        monkeypatch.setitem(sys.modules, "cudnn", module)
        assert conv_backends.why_no_cudnn(cpu) == reason
        conv_backends.why_no_cudnn.cache_clear()
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace())
    assert conv_backends.why_no_cudnn(cpu).startswith("cuDNN: ")


@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("taps", [torch.float32, torch.float64])
def test_cudnn_computes_in_the_wider_dtype_as_tiles_do(
    inputs: torch.dtype, taps: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def conv(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        computed.append((x.dtype, k.dtype))
        return toeplitz_dense(x.transpose(1, 2), k).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(ops=SimpleNamespace(fft_causal_conv1d=conv)))
    x, k, _ = case(2, 9, 9, inputs)
    with use_backend("cudnn"):
        y = toeplitz(x, k.to(taps))
    wide = torch.promote_types(inputs, taps)
    assert computed == [(wide, wide)]
    expected = toeplitz(x, k.to(taps))
    assert y.dtype == expected.dtype == inputs
    eps = torch.finfo(inputs).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=1e3 * torch.finfo(wide).eps)


@pytest.mark.parametrize(
    ("no_cudnn", "no_windows", "causal", "both_directions"),
    [
        ("", "", "cudnn", "windows"),
        ("old", "", "windows", "windows"),
        ("", "old", "cudnn", "tiles"),
        ("old", "old", "tiles", "tiles"),
    ],
)
def test_gpu_uses_the_best_backend_that_works(
    monkeypatch: pytest.MonkeyPatch, no_cudnn: str, no_windows: str, causal: str, both_directions: str
) -> None:
    monkeypatch.setattr(conv_backends, "why_no_cudnn", lambda _: no_cudnn)
    monkeypatch.setattr(conv_backends, "why_no_windows", lambda _: no_windows)
    gpu = torch.device("cuda")
    assert training_backend(gpu, causal=True) == causal
    assert training_backend(gpu, causal=False) == both_directions


def test_the_check_may_run_in_a_block_whose_activations_are_recomputed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[str] = []

    def first_time(device: torch.device, causal: bool) -> str:
        if not checked:
            checked.append(why_it_fails("row_conv", device, lambda where: _check(where, _by_windows)))
        return "windows"

    monkeypatch.setattr("tnnlm.ops.toeplitz.training_backend", first_time)
    x, k = torch.randn(2, 9, 3, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    again = checkpoint(toeplitz, x, k, use_reentrant=False)
    found = torch.autograd.grad(again.square().sum(), (x, k))
    expected = torch.autograd.grad(toeplitz(x, k).square().sum(), (x, k))
    assert checked == [""]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("backend", ["windows", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    gpu = torch.device("cuda")
    reason = conv_backends.why_no_windows(gpu) if backend == "windows" else conv_backends.why_no_cudnn(gpu)
    if reason:
        pytest.skip(reason)
    for batch, length in ((1, 64), (3, 100), (18, 1000)):
        x, k, weight = case(batch, length, length, dtype)
        inputs = (
            x.detach().to(gpu).requires_grad_(),
            k.detach().float().to(gpu).requires_grad_(),
            weight.to(gpu),
        )
        with use_backend(backend):
            got = gradients(toeplitz, *inputs)
        with use_backend("tiles"):
            expected = gradients(toeplitz, *inputs)
        for left, right in zip(got, expected, strict=True):
            scale = float(right.abs().max())
            eps = torch.finfo(left.dtype).eps
            torch.testing.assert_close(left, right, rtol=2 * eps, atol=1e-5 * scale)
