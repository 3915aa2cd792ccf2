"""Independent check of certificates: it passes on a converted run and finds figures that are too small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import check_conversion
from check_conversion import Figures, impulse_response, measured_figures
from tests.support.training_runs import tiny_run
from tnnlm.conversion import convert_taps
from tnnlm.errors import run_script


def test_a_run_is_checked_at_every_length(
    run_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_conversion.py", str(run_here), "--json", "checks.json"])
    assert run_script(check_conversion.main) == 0, capsys.readouterr()
    result = json.loads(Path("checks.json").read_text())[0]
    length = tiny_run().model.max_length
    assert set(result["ppl_gap"]) == {str(multiple * length) for multiple in (1, 2, 8)}
    assert all(row["stated"]["l1_error"] > 0 for row in result["layers"])


def test_a_figure_below_the_measured_one_is_found() -> None:
    k = 0.9 ** torch.arange(64, dtype=torch.float64).repeat(2, 1)
    params, _ = convert_taps(k[:, :32] * 1.01, method="window")
    found = measured_figures(k, params, 32)
    assert found.relative_tap_error == pytest.approx(0.01, rel=1e-6)
    assert torch.equal(impulse_response(params, 64)[:, 32:], torch.zeros(2, 32, dtype=torch.float64))
    assert Figures(0.009, found.l1_error, found.largest_pole).below(found) == ["relative_tap_error"]
    assert Figures(float("nan"), 1.0, 1.0).below(found) == ["relative_tap_error"]
    assert not found.below(found)
