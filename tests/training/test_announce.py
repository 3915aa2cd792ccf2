"""Warnings at the start of a run about settings that don't fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import FAMILIES
from tests.support.training_runs import tiny_run
from tnnlm.data.report import DataReport
from tnnlm.training.announce import announce
from tnnlm.training.lit_module import LitModel


@pytest.mark.parametrize(
    ("family", "settings", "warned"),
    [
        ("tno", ("method=etsc", "horizon=8"), True),
        ("tno", ("method=window", "horizon=2048"), False),
        ("sgconv", ("method=window", "horizon=8"), True),
        ("rtf", ("method=companion", "horizon=8"), False),
    ],
)
def test_a_horizon_below_that_of_auto_is_reported(
    family: str, settings: tuple[str, ...], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(*(f"conversion.{setting}" for setting in settings))
    config.model.kernel = FAMILIES[family]()
    announce(config, LitModel(config).model, Path("runs/demo"), DataReport(), None, None)
    out = capsys.readouterr().out
    assert ("warning: conversion.horizon=8 is below the " in out) is warned
    assert ("the recurrence in checkpoints differs from position 8 on" in out) is warned


def test_a_kernel_that_can_not_be_converted_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no taps today")

    monkeypatch.setattr("tnnlm.training.attached.convert_kernel", fail)
    config = tiny_run()
    announce(config, LitModel(config).model, Path("runs/demo"), DataReport(), None, None)
    assert capsys.readouterr().out.startswith("runs/demo: ")


@pytest.mark.parametrize("setting", ["window_taps=5000", "order=5000"])
def test_a_conversion_that_would_fail_is_refused_before_the_run(setting: str, script: Any) -> None:
    words = ("conversion.method=balanced", f"conversion.{setting}", "trainer.accelerator=cpu")
    for more in ((), ("--dry-run",)):
        result = script("train", *words, *more)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"conversion: {setting.replace('=', ' ').replace('_', ' ')}: must be" in result.err
        assert not Path("runs").exists()
