"""Acceptance of the recurrence that a kernel defines, and refusal before a training or conversion begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.models import FAMILIES
from tests.support.training_runs import tiny_run
from tests.support.unchanged import files_under
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.companion import AGREEMENT, companion
from tnnlm.conversion.window import window
from tnnlm.deployment.pipeline import convert_checkpoint
from tnnlm.errors import UserError
from tnnlm.kernels import RTFConfig, RTFKernel
from tnnlm.ops.companion import CompanionParams, CompanionState
from tnnlm.training.run import train


def recurrence_of(*poles: complex) -> CompanionParams:
    """Return a float64 recurrence of one channel with these poles."""
    a = torch.from_numpy(np.real(np.poly(poles)))[None, 1:]
    numerator = torch.linspace(1, -1, len(poles), dtype=torch.float64)[None]
    return CompanionParams(torch.ones(1, dtype=torch.float64), numerator, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stable_recurrence_is_accepted_unchanged(dtype: torch.dtype) -> None:
    own = recurrence_of(0.999, 0.5, 0.9j, -0.9j).to_dtype(dtype)
    state = torch.random.get_rng_state()
    kept = companion(own)
    assert all(torch.equal(a, b) for a, b in zip(kept, own, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("method", ["window", "companion"])
def test_a_recurrence_has_no_tensor_and_no_gradient_of_the_kernel(method: str) -> None:
    kernel = RTFKernel(RTFConfig(name="rtf", state_size=3), 2, 16)
    k = kernel(16)
    params = window(k) if method == "window" else companion(kernel.recurrence())
    before = [part.clone() for part in params]
    with torch.no_grad():
        for tensor in (k.detach(), *kernel.parameters()):
            tensor += 1
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not any(part.requires_grad for part in params)


@pytest.mark.parametrize("radius", [1.0, 1.02])
def test_a_pole_on_or_outside_the_unit_circle_is_refused(radius: float) -> None:
    own = recurrence_of(1j * radius, -1j * radius)
    with pytest.raises(UserError, match=rf"pole of modulus {radius:.5f}, on or outside the unit circle"):
        companion(own)


def test_a_recurrence_whose_state_loses_its_digits_is_refused() -> None:
    own = recurrence_of(*[0.75] * 12)
    companion(own)  # Twelve equal poles take eleven digits, and float64 has sixteen.
    rounded = own.to_dtype(torch.float32)
    assert rounded.largest_pole() < 1
    with pytest.raises(UserError, match=r"method companion: .* prefill and step disagree by") as caught:
        companion(rounded)
    assert caught.value.remedy == "use --method auto or window"


@pytest.mark.parametrize("error", [2 * AGREEMENT, float("nan")])
def test_steps_that_differ_from_prefill_are_refused(error: float) -> None:
    class Wrong(CompanionParams):
        def step(
            self, x: Tensor, state: CompanionState, active: Tensor | None = None
        ) -> tuple[Tensor, CompanionState]:
            y, after = super().step(x, state, active)
            return y * (1 + error), after

    with pytest.raises(UserError, match="prefill and step disagree by"):
        companion(Wrong(*recurrence_of(0.9, 0.5)))


@pytest.mark.parametrize(
    ("family", "method"), [("tno", "companion"), ("sgconv", "companion"), ("rtf", "multirate")]
)
def test_training_for_a_recurrence_that_the_kernel_lacks_is_refused(
    tmp_path: Path, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_run()
    config.model.kernel = FAMILIES[family]()
    config.conversion.method = method
    before = files_under(tmp_path)
    reason = f"conversion.method={method}: the kernel {family} defines no such recurrence"
    with pytest.raises(UserError, match=reason):
        train(config)
    assert files_under(tmp_path) == before


def test_convert_names_the_kernel_that_defines_no_recurrence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_run("trainer.max_steps=1")
    train(config)
    run = tmp_path / "runs" / config.name
    before = files_under(run)
    for method in ("companion", "multirate"):
        with pytest.raises(UserError, match=f"--method {method}: the kernel tno defines no such recurrence"):
            convert_checkpoint(str(run), ConversionConfig(method=method), out=None, force=False, verify=False)
    assert files_under(run) == before
