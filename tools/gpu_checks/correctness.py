"""Results on the GPU compared with references, and the tests of the repository with the mark ``gpu``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_checks.rows import Emit
from gpu_checks.shapes import DEMO, Setting
from tnnlm.conversion.convert import convert_model
from tnnlm.models.causal_lm import CausalLM
from tnnlm.ops.reference import toeplitz_dense
from tnnlm.ops.toeplitz import toeplitz

ROOT = Path(__file__).parents[2]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest relative error of a Toeplitz product and its gradients."""
STEP_LIMIT = 1e-4
"""Largest difference between the logits of steps and of the parallel form of a converted model."""


def agreement(setting: Setting, emit: Emit) -> None:
    """Compare convolutions, their gradients and decoding steps on the device with references."""
    for dtype, limit in LIMITS.items():
        for length in (1, 7, 100, 1000):
            name = f"convolution and gradients, {str(dtype).removeprefix('torch.')}, {length} tokens"
            emit(_compared(name, _convolution_error(length, dtype, setting.device), limit))
    emit(_compared("steps of a converted model", _step_error(setting), STEP_LIMIT))


def _compared(name: str, error: float, limit: float) -> dict[str, Any]:
    return {"kind": "correctness", "name": name, "error": error, "limit": limit, "passed": error <= limit}


def _convolution_error(length: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative error of outputs and gradients against dense products on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, k, weight = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((2, length, 3), (3, length), (2, length, 3))
    )
    expected = _results(toeplitz_dense, x, k, weight)
    found = _results(toeplitz, *(part.to(device, dtype) for part in (x, k, weight)))
    return max(float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def _results(product: Any, x: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    inputs = (x.requires_grad_(), k.requires_grad_())
    y = product(*inputs)
    return (y.detach(), *torch.autograd.grad((y * weight).sum(), inputs))


@torch.inference_mode()
def _step_error(setting: Setting) -> float:
    """Return the largest difference of logits, decoding one token at a time on the device."""
    torch.manual_seed(0)
    shape = setting.sized(DEMO)
    model = convert_model(CausalLM(shape.model).eval(), method="balanced").to(setting.device)
    tokens = torch.randint(shape.model.vocab_size, (2, 33), device=setting.device)
    expected, state, worst = model(tokens), model.init_state(2), 0.0
    for position in range(tokens.shape[1]):
        logits, state = model.step(tokens[:, position], state)
        worst = max(worst, float((logits - expected[:, position]).abs().max()))
    return worst


def marked_files(root: Path = ROOT) -> list[Path]:
    """Return the files of tests with the mark ``gpu``."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [path for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


class _Outcomes:
    """Plugin of pytest that stores the outcome of every test."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Store a failure of any phase, or the result of the test itself."""
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("tests/")[2]
            outcome = {"kind": "tests", "name": name, "outcome": report.outcome}
            self.emit(outcome | ({"failed": str(report.longrepr)[-2000:]} if report.failed else {}))

    def pytest_collectreport(self, report: Any) -> None:
        """Store a file whose tests can't be imported, as skipped if a package is missing."""
        if report.failed:
            missing = "ModuleNotFoundError" in str(report.longrepr)
            name, text = report.nodeid.rpartition("tests/")[2], str(report.longrepr)[-2000:]
            outcome = {"outcome": "skipped"} if missing else {"outcome": "failed", "failed": text}
            self.emit({"kind": "tests", "name": name} | outcome)


def repository_tests(setting: Setting, emit: Emit) -> None:
    """Run the tests with the mark ``gpu``.

    Raises:
        ModuleNotFoundError: If pytest or a package that the tests import is missing.
        RuntimeError: If pytest can't collect the tests.
    """
    import pytest

    importlib.import_module("tests.conftest")
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    words += ["--rootdir", str(ROOT), "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*words, *map(str, marked_files())], plugins=[_Outcomes(emit)])
    if code not in (0, 1, 5):  # passed, failed, none collected
        raise RuntimeError(f"pytest ended with exit code {int(code)}")
