"""Benchmark of convert.py: the record of a tiny shape and a tiny run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import convert_time


def test_record_states_layers_runs_and_their_command(run_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Path("shape.yaml")
    shape.write_text("model: {d_model: 8, n_layers: 30, vocab_size: 300, max_length: 32, expand: 2}\n")
    words = ["convert_time", str(run_here), "--shape", str(shape), "--out", "record.json"]
    monkeypatch.setattr(sys, "argv", words)
    assert convert_time.main() == 0
    record = json.loads(Path("record.json").read_text())
    assert record["command"] == "python -m benchmarks.convert_time runs/tiny"
    values = record["values"]
    assert (values["layers"], values["channels"]) == (30, 16)
    assert values["minutes"] == pytest.approx(values["layer_seconds"] * 30 / 60)
    (row,) = record["tables"]["runs"]
    assert row["run"] == "tiny"
    assert " at 32, " in row["tokens scored"]
    assert json.loads((run_here / "converted/conversion.json").read_text())["method"] == "auto"
