"""Backends of the loss: Liger's kernel equals float64 in the interpreter, and is used only if it works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.support.scripts import ROOT
from tnnlm.ops import cross_entropy, liger_softmax, loss_backends
from tnnlm.ops.cross_entropy import linear_cross_entropy
from tnnlm.ops.loss_backends import IGNORED, loss_backend, use_loss_backend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_liger = pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="liger-kernel or Triton is not installed"
)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_check() -> Iterator[None]:
    cached = loss_backends.why_no_liger  # a test may replace it
    cached.cache_clear()
    yield
    cached.cache_clear()


def check_values(device: torch.device, most: float = 1.2) -> None:
    """Compare the errors of loss and gradients of both backends, for every precision and odd sizes.

    Args:
        device: Device to compute on.
        most: Largest ratio of the errors of Liger and PyTorch, against float64.
    """
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens, width, words in ((5, 7, 61), (3, 4, 33_001), (1, 3, 1)):
            features = torch.randn(tokens, width, device=device, requires_grad=True)
            weight = torch.randn(words, width, device=device, requires_grad=True)
            targets = torch.randint(words, (tokens,), device=device)
            targets[1::3] = IGNORED
            # The same weights embed the tokens, as in a model with tied embeddings.
            inputs = features + weight[targets.clamp(min=0)]
            exact = functional.cross_entropy(inputs.double() @ weight.double().T, targets)
            references = torch.autograd.grad(exact, [features, weight], retain_graph=True)
            errors: dict[str, list[Tensor]] = {}
            for name in ("torch", "liger"):
                with use_loss_backend(name), torch.autocast(device.type, dtype, dtype != torch.float32):
                    loss = linear_cross_entropy(inputs, weight, targets)
                    with torch.no_grad():
                        assert torch.equal(linear_cross_entropy(inputs, weight, targets), loss)
                assert loss.dtype == torch.float32
                got = torch.autograd.grad(1024 * loss, [features, weight], retain_graph=True)
                errors[name] = [
                    (ours / 1024 - right).norm() for ours, right in zip(got, references, strict=True)
                ]
                errors[name].append((loss - exact).abs())
            scales = [*(right.norm() for right in references), exact.abs()]
            for ours, theirs, scale in zip(errors["liger"], errors["torch"], scales, strict=True):
                assert ours <= most * theirs + 1e-5 * scale, (dtype, tokens, ours, theirs, scale)


def check_interpreter() -> None:
    """Check the values on the CPU; run with TRITON_INTERPRET=1."""
    with mock.patch.object(cross_entropy, "_MOST_ON_CPU", 1):
        check_values(CPU, most=3)  # The interpreter truncates to bfloat16, a GPU rounds.
        assert loss_backends.why_no_liger(CPU) == ""


@needs_liger
def test_liger_is_as_accurate_as_torch_in_the_interpreter(tmp_path: Path) -> None:
    # In a separate process, because Triton reads the variable when it is imported.
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_INTERPRET": "1"}
    code = "from tests.ops.test_loss_backends import check_interpreter; check_interpreter()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.gpu
def test_liger_is_as_accurate_as_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := loss_backends.why_no_liger(GPU):
        pytest.skip(reason)
    monkeypatch.setattr(cross_entropy, "_MOST_ON_GPU", 1)
    check_values(GPU)


class Kernel:
    """Stand-in for Liger's kernel in PyTorch, with its parameters and no others."""

    def __getitem__(self, grid: tuple[int]) -> Kernel:
        return self

    def __call__(
        self,
        X_ptr: Tensor,
        Y_ptr: Tensor,
        loss_ptr: Tensor,
        n_non_ignore: float,
        ignore_index: int,
        HAS_GRADIENTS: bool,
        **_: object,
    ) -> None:
        kept = Y_ptr != ignore_index
        losses = functional.cross_entropy(X_ptr.float(), Y_ptr, reduction="none", ignore_index=ignore_index)
        loss_ptr.copy_(losses / n_non_ignore)
        if HAS_GRADIENTS:
            slope = X_ptr.float().softmax(1)
            slope[kept, Y_ptr[kept]] -= 1
            X_ptr.copy_(slope * kept[:, None] / n_non_ignore)


def test_a_kernel_with_liger_s_parameters_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_softmax, "_kernel", lambda: Kernel())
    monkeypatch.setattr(cross_entropy, "_MOST_ON_CPU", 1)
    check_values(CPU)


def test_targets_outside_of_the_vocabulary_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_softmax, "_kernel", lambda: Kernel())
    for target in (-1, 5):
        with pytest.raises(RuntimeError):
            liger_softmax.scored_in_place(
                torch.zeros(1, 5), torch.tensor([target]), 1.0, IGNORED, slopes=False
            )


def test_cpu_and_float64_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_backends, "why_no_liger", lambda _: "")
    assert loss_backend(GPU, torch.bfloat16) == "liger"
    assert loss_backend(GPU, torch.float64) == loss_backend(CPU, torch.float32) == "torch"
    with use_loss_backend("torch"):
        assert loss_backend(GPU, torch.bfloat16) == "torch"


class WrongKernel(Kernel):
    """Kernel with a loss that is off."""

    def __call__(self, *, loss_ptr: Tensor, **more: object) -> None:  # type: ignore[override]
        super().__call__(loss_ptr=loss_ptr, **more)  # type: ignore[arg-type]
        loss_ptr += 1


class OldKernel(Kernel):
    """Kernel of a version without some of the parameters."""

    def __call__(self, X_ptr: Tensor, Y_ptr: Tensor) -> None:  # type: ignore[override]
        """Never called."""


@pytest.mark.parametrize(
    ("kernel", "reason"), [(WrongKernel, "the results are wrong"), (OldKernel, "unexpected keyword")]
)
def test_a_broken_or_old_liger_falls_back_with_one_warning(
    kernel: type[Kernel], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_backends, "find_spec", lambda name: name)
    monkeypatch.setattr(liger_softmax, "_kernel", lambda: kernel())
    with pytest.warns(UserWarning, match=f"without liger-kernel: .*{reason}"):
        assert reason in loss_backends.why_no_liger(CPU)
    assert reason in loss_backends.why_no_liger(CPU)  # without a second warning


def test_a_missing_liger_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_backends, "find_spec", lambda name: None)
    assert loss_backends.why_no_liger(CPU) == "liger-kernel is not installed"
