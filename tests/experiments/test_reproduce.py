"""Experiments at a tiny size: the format of their results, and that an interrupted experiment resumes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.frame import Record
from experiments.results import reproduce
from experiments.stability import FAILED, STABILITY
from tests.support.scripts import ROOT
from tnnlm.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    reproduce(STABILITY, "tiny", out, lambda cells: cells)
    return out


def rows_of(folder: Path, **wanted: Any) -> Iterator[Record]:
    cells = json.loads((folder / "stability.json").read_text())["cells"]
    for key, measured in cells.items():
        row = json.loads(key) | measured
        if all(row.get(name) == value for name, value in wanted.items()):
            yield row


def test_etsc_is_exact_within_its_horizon_and_given_eigenvalues_are_not(folder: Path) -> None:
    for sweep in ("length", "decay", "depth", "initialisation"):
        for row in rows_of(folder, method="etsc", sweep=sweep):
            assert row["inside_error"] < 1e-4
    worst = max(row["inside_error"] for row in rows_of(folder, method="vandermonde", sweep="length"))
    assert worst > FAILED


def test_precision_decides(folder: Path) -> None:
    (wide,), (single,), (half,) = (
        list(rows_of(folder, method="etsc", sweep="precision", stored=stored))
        for stored in ("float64", "float32", "bfloat16")
    )
    assert wide["inside_error"] < 1e-3 * single["inside_error"]
    assert half["inside_error"] > 1e3 * single["inside_error"]


def test_rough_taps_are_refused_by_balanced_and_exact_in_a_window(folder: Path) -> None:
    for source in ("noise", "heavy tails", "one late tap"):
        (refused,) = rows_of(folder, method="balanced", source=source)
        assert refused["refused"]
        assert "can't be met" in refused["told"]
        (kept,) = rows_of(folder, method="window", source=source)
        assert max(kept["inside_error"], kept["output_error"]) < 1e-5


def test_a_truncated_kernel_is_inexact_past_its_horizon(folder: Path) -> None:
    (row,) = rows_of(folder, method="etsc", sweep="decay", decay=1.0)
    assert row["inside_error"] < 1e-4 < FAILED < row["output_error"]
    (row,) = rows_of(folder, method="balanced", sweep="decay", decay=1.0)
    assert row["output_error"] < FAILED


def test_the_certificate_bounds_the_measured_error(folder: Path) -> None:
    rows = [row for row in rows_of(folder) if "l1_error" in row]
    assert len(rows) > 20
    assert all(row["bounded_error"] <= row["l1_error"] + 1e-5 for row in rows)


def test_page_plot_and_index(folder: Path) -> None:
    page = (folder / "stability.md").read_text()
    assert "## Thresholds" in page
    assert "| decay per lag | etsc | - | " in page
    assert "`the horizon of 64 lags omits" in page
    assert "### Decay per lag" in page
    assert "| 0.9 | " in page
    assert (folder / "stability.png").stat().st_size > 10_000
    index = (folder / "README.md").read_text()
    assert "[stability](stability.md)" in index
    assert "holds" in index


def test_a_stopped_experiment_resumes(tmp_path: Path, folder: Path) -> None:
    measured: list[int] = []

    def some(cells: Iterable[Record]) -> Iterator[Record]:
        for number, cell in enumerate(cells):
            if number == 5:
                raise KeyboardInterrupt
            yield cell

    def counted(cells: Iterable[Record]) -> Iterator[Record]:
        for cell in cells:
            measured.append(1)
            yield cell

    with pytest.raises(KeyboardInterrupt):
        reproduce(STABILITY, "tiny", tmp_path, some)
    claims = reproduce(STABILITY, "tiny", tmp_path, counted)
    assert len(measured) == len(STABILITY.grid("tiny")) - 5
    whole = json.loads((folder / "stability.json").read_text())["verdicts"]
    assert [claim._asdict() for claim in claims] == whole


def test_again_repeats_the_measurements(tmp_path: Path, folder: Path) -> None:
    measured: list[Record] = []

    def counted(cells: Iterable[Record]) -> Iterator[Record]:
        for cell in cells:
            measured.append(cell)
            yield cell
            return

    shutil.copy(folder / "stability.json", tmp_path)
    reproduce(STABILITY, "tiny", tmp_path, counted)
    assert not measured
    with pytest.raises(KeyError):  # stopped after the first cell
        reproduce(STABILITY, "tiny", tmp_path, counted, again=True)
    assert len(measured) == 1
    assert len(json.loads((tmp_path / "stability.json").read_text())["cells"]) == 1


def test_results_of_another_size_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "stability.json"
    path.write_text(json.dumps({"name": "stability", "size": "paper", "seconds": 0, "cells": {}}))
    with pytest.raises(UserError, match="holds size paper"):
        reproduce(STABILITY, "tiny", tmp_path, lambda cells: cells)
    path.write_text("{")
    with pytest.raises(UserError, match="corrupt"):
        reproduce(STABILITY, "tiny", tmp_path, lambda cells: cells)
    assert path.read_text() == "{"


def test_cells_are_all_different() -> None:
    for size in ("tiny", "small", "paper"):
        cells = [json.dumps(cell, sort_keys=True) for cell in STABILITY.grid(size)]
        assert len(set(cells)) == len(cells)


def test_the_tool() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *words]
        return subprocess.run(command, capture_output=True, text=True)

    assert "stability" in run("--list").stdout
    wrong = run("nothing")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "expected one of extrapolation, " in wrong.stderr
