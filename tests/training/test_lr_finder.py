"""The learning-rate finder: rates of every parameter group, no files left, and a sensible suggestion."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.training_runs import SETTINGS, tiny_run, write_text
from tnnlm.errors import DataError
from tnnlm.training import lr_finder as module
from tnnlm.training.lr_finder import HIGHEST, LOWEST, STEPS, find_lr, suggest


def test_find_lr_suggests_plots_and_leaves_no_run(script: Any) -> None:
    write_text()
    result = script("train", *SETTINGS, "--find-lr", "trainer.accumulate=2", "optim.kernel_lr_scale=0.5")
    assert result.code == 0, result.err
    assert "suggested: optim.lr=" in result.out
    # There is no progress bar, because stderr is no terminal.
    assert result.err.splitlines() == [f"learning-rate finder: step {step}/100" for step in (25, 50, 75, 100)]
    assert sorted(str(p) for p in Path("runs").rglob("*")) == ["runs/demo-lr_find.png"]
    assert Path("runs/demo-lr_find.png").read_bytes().startswith(b"\x89PNG")


def test_rates_rise_and_kernels_keep_their_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    monkeypatch.setattr(module, "build_optimizer", recorded(module.build_optimizer, seen))
    found = find_lr(tiny_run("optim.kernel_lr_scale=0.25", "optim.warmup_steps=50"))
    assert len(seen) == len(found.losses) == STEPS
    for rates, tried in zip(seen, found.rates, strict=True):
        assert rates == pytest.approx([tried, tried, 0.25 * tried])
    assert found.rates[0] == pytest.approx(LOWEST, rel=0.2)
    assert found.rates[-1] == pytest.approx(HIGHEST, rel=0.2)
    assert LOWEST < found.steepest <= found.suggestion <= found.lowest < HIGHEST


def recorded(build: Any, seen: list[list[float]]) -> Any:
    """Return a function that builds an optimizer and records the rates used in each step."""

    def make(*args: Any) -> Any:
        optimizer = build(*args)
        optimizer.register_step_post_hook(
            lambda o, *_: seen.append([group["lr"] for group in o.param_groups])
        )
        return optimizer

    return make


def test_suggestion_is_the_steepest_fall_not_noise_at_the_low_end() -> None:
    rates = np.geomspace(1e-6, 1, 100)
    logs = np.log10(rates)
    # Flat at first, steepest at 1e-3, and rising again from 3e-2.
    losses = 8 - 3 / (1 + np.exp(-4 * (logs + 3))) + np.where(logs > -1.5, 4 * (logs + 1.5) ** 2, 0)
    losses += np.random.default_rng(0).normal(0, 0.02, 100)
    found = suggest(rates.tolist(), losses.tolist())
    assert found.steepest == pytest.approx(1e-3, rel=0.6)
    assert 5e-3 < found.lowest < 1e-1
    assert found.suggestion**2 == pytest.approx(found.steepest * found.lowest)
    cut = [*losses[:80], *[math.nan] * 20]
    assert suggest(rates.tolist(), cut).suggestion == pytest.approx(found.suggestion)


@pytest.mark.parametrize("losses", [[8.0] * 100, [math.nan] * 100, [5 + 0.1 * i for i in range(100)]])
def test_a_loss_that_never_falls_suggests_nothing(losses: list[float]) -> None:
    with pytest.raises(DataError):
        suggest(np.geomspace(1e-6, 1, 100).tolist(), losses)
