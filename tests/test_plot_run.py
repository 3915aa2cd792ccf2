"""Tests of tools/plot_run.py on finished runs, on runs in progress, and on other folders."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from plot_run import final_figures, plot_runs, read_run
from tests.support.scripts import ROOT, Result
from tests.support.training_runs import tiny_run
from tnnlm.errors import run_script
from tnnlm.training.loggers.names import Place, metrics_at
from tnnlm.training.run import train


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls tools/plot_run.py in this process."""
    spec = importlib.util.spec_from_file_location("plot_run", ROOT / "tools/plot_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *words])
        capsys.readouterr()
        return Result(run_script(module.main), *capsys.readouterr())

    return call


def write_run(name: str, text: str) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)
    return folder


def test_one_run_and_several_are_plotted(tool: Any) -> None:
    train(tiny_run("name=one"))
    train(tiny_run("name=two", "optim.lr=1e-4"))
    single = tool("one")
    assert single.code == 0, single.err
    assert Path("runs/one/run.png").read_bytes().startswith(b"\x89PNG")
    several = tool("runs/one", "two", "--out", "both.png")
    assert several.code == 0
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")
    figures = [final_figures(read_run(Path("runs") / run)) for run in ("one", "two")]
    assert figures[0]["step"] == "20"
    assert "masked perplexity" not in several.out  # no run has this metric
    for key, title in ((metric.column, metric.label) for metric in metrics_at(Place.TABLE)):
        if {of_run[key] for of_run in figures} == {"-"}:
            continue
        row = next(line for line in several.out.splitlines() if f" {title} " in line)
        assert [cell.strip() for cell in row.split("│")[2:4]] == [of_run[key] for of_run in figures]


def test_every_panel_of_one_run_holds_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_run())
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    run = read_run(Path("runs/demo"))
    plot_runs([run], Path("a.png"))
    axes = drawn[0].axes
    lines = {str(line.get_label()): list(line.get_ydata()) for axis in axes for line in axis.lines}
    assert lines["recurrent"] == run.of("val/ppl_recurrent")[1]
    assert lines["of which waiting for data"] == run.of("train/data_seconds")[1]
    assert lines["before clipping"] == run.of("train/grad_norm")[1]
    assert (
        sum(
            label.startswith("layer ")
            for axis in axes
            for label in map(str, [x.get_label() for x in axis.lines])
        )
        == 4
    )
    assert all(axis.get_xlabel() and axis.get_ylabel() and axis.get_title() for axis in axes[:8])


def test_a_run_without_validation_yet_and_one_of_an_older_version_are_plotted(tool: Any) -> None:
    write_run("young", "step,train/loss,train/lr\n5,6.0,0.1\n")
    write_run("spiky", "step,train/loss,train/grad_norm,val/ppl\n5,inf,nan,\n10,3.0,1.0,20.0\n")
    assert tool("young").code == 0
    assert tool("young", "spiky").code == 0
    assert read_run(Path("runs/spiky")).of("train/loss") == ([10], [3.0])


@pytest.mark.parametrize("words", [("nowhere",), ("empty",)])
def test_other_folders_are_refused(tool: Any, words: tuple[str, ...]) -> None:
    write_run("empty", "step,train/loss\n")
    refused = tool(*words)
    assert refused.code == 2
    assert refused.err.startswith("error: ")
    assert words[0] in refused.err
    assert not list(Path().rglob("*.png"))
