"""Stable columns of metrics.csv: a resumed run appends to the existing file."""

from __future__ import annotations

from tests.support.scripts import ROOT
from tnnlm.training.loggers.names import METRICS, Place, csv_columns
from tnnlm.training.tasks import VALIDATION_TASKS

OLD = ROOT / "tests/fixtures/version_0.1.0/runs/old/metrics.csv"
N_COMMON = 10
"""Number of columns that every task has, which precede those of its validation."""


def test_columns_are_those_of_version_0_1_0() -> None:
    header = OLD.read_text(encoding="utf-8").splitlines()[0].split(",")
    # Later metrics follow, so that older files keep their columns.
    assert list(csv_columns(Place.CAUSAL, n_layers=2)) == [*header, "val/ppl_word"]
    for place, value in ((Place.MASKED, "val/ppl_masked"), (Place.CLASSIFY, "val/accuracy")):
        assert list(csv_columns(place, 0)) == [*header[:N_COMMON], "val/loss", value]


def test_names_are_unique() -> None:
    assert len({metric.column for metric in METRICS}) == len(METRICS)
    shorts = [metric.short for metric in METRICS if metric.short]
    assert len(set(shorts)) == len(shorts)


def test_every_task_shows_what_it_monitors() -> None:
    for task in VALIDATION_TASKS.values():
        assert task.monitor in task.shown()
        assert set(task.shown()) <= set(task.columns())
