"""State against error of the forms that could hold a finite kernel, and the tool that shows it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, tiny_config
from experiments.finite_forms import finite_forms, multirate
from tnnlm.config.loader import config_to_yaml, load_config
from tnnlm.errors import run_script
from tnnlm.kernels import SGConvConfig, SGConvKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.run import train
from training_runs import tiny_run

SGCONV = ("model.kernel.name=sgconv", "model.kernel.kernel_dim=8")


def test_multirate_with_moments_for_every_lag_is_exact() -> None:
    kernel = SGConvKernel(SGConvConfig(name="sgconv", kernel_dim=4), 3, 32)
    states, error = multirate(kernel, 16)
    assert states == 32
    assert error < 1e-7
    few, many = multirate(kernel, 1), multirate(kernel, 2)
    assert few[0] < many[0] < 64
    assert 0 < many[1] < few[1] < 1


def test_forms_trade_state_for_error() -> None:
    torch.manual_seed(0)
    model = CausalLM(tiny_config(kernel=SGConvConfig(name="sgconv", kernel_dim=8), max_length=128)).eval()
    found = finite_forms(model, {32: torch.randint(300, (2, 33))})
    shared = [row for row in found if row["form"] == "balanced, shared poles"]
    assert [row["order"] for row in shared] == [16, 32, 64]
    errors = [row["error"] for row in shared]
    assert errors == sorted(errors, reverse=True)
    assert all(0 < row["bound"] < 1 for row in shared)
    assert {"multi-rate, 2 per cell", "window", "balanced, channel poles"} <= {row["form"] for row in found}
    exact = found[-1]
    assert exact["order"] == 127
    assert abs(exact["gap"][32]) < 1e-5


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("sgconv_forms", ROOT / "tools" / "sgconv_forms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sgconv_forms.py", *words])
        return run_script(module.main)

    return call


def test_tool_prints_a_table_of_a_run(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trainer.max_steps=2", "conversion.method=window", "name=rough", *SGCONV]
    config = tiny_run()
    Path("base.yaml").write_text(config_to_yaml(config))
    train(load_config("base.yaml", words), None)
    capsys.readouterr()
    assert tool("runs/rough", "--tokens", "64", "--out", "forms.json") == 0
    assert "| window | 31 |" in capsys.readouterr().out
    assert json.loads(Path("forms.json").read_text())[-1]["form"] == "window"
    assert tool("runs/rough", "--tokens", "0") == 2
    train(load_config("base.yaml", ["trainer.max_steps=2", "name=smooth"]), None)
    capsys.readouterr()
    assert tool("runs/smooth") == 2
    assert "not sgconv" in capsys.readouterr().err
