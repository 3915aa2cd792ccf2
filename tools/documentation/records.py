"""Measurements as JSON files in docs/records, and the values that pages show of them.

A record names its command, machine, CPU level, PyTorch version, date and commit. It holds ``values`` (numbers
by name), ``tables`` (lists of rows, which are dictionaries of cells), ``texts`` (captured output), or
``result`` (what ``tools/benchmark.py --json`` writes).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.report import case_field

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs/records"
RESULTS = ROOT / "docs/results"
PROVENANCE = ("command", "machine", "cpu_level", "torch", "date", "commit")
"""Keys that every record has."""


@cache
def record(name: str) -> dict[str, Any]:
    """Return a record of docs/records, or the results of an experiment in docs/results.

    Args:
        name: File name without its suffix.

    Raises:
        KeyError: If there is no such file.
    """
    for folder in (RECORDS, RESULTS):
        path = folder / f"{name}.json"
        if path.is_file():
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return data
    raise KeyError(f"{name}: no such record in docs/records or docs/results")


def figure(expression: str) -> str:
    """Return a figure as a page shows it.

    Args:
        expression: ``PATH`` or ``PATH over PATH`` (a ratio), and optionally `` : FORMAT``, a format
            specification of Python.

    Raises:
        KeyError: If a path leads nowhere.
    """
    paths, _, spec = expression.strip().partition(" : ")
    above, _, below = paths.partition(" over ")
    value = value_at(above.strip())
    if below:
        value = float(value) / float(value_at(below.strip()))
    return f"{value:{spec.strip()}}"


def value_at(path: str) -> Any:
    """Return the value at a path.

    ``RECORD/KEY`` is one of a record's values. ``RECORD/NAME/DTYPE/CASE`` is a benchmark's result:
    milliseconds per token where the mode is decode, tokens per second otherwise; CASE is a context or a
    batch size.
    ``RESULTS/key=value,.../FIELD/...`` is the mean over the cells of an experiment that have these settings.
    """
    name, *keys = path.split("/")
    data = record(name)
    if "cells" in data:
        return _mean_of_cells(data["cells"], keys)
    if "result" in data and keys[0] not in data.get("values", {}):
        return _benchmark_value(data["result"], keys)
    value: Any = data["values"]
    for key in keys:
        value = value[key]
    return value


def _benchmark_value(result: dict[str, Any], keys: list[str]) -> float:
    name, dtype, case, *field = keys
    column = case_field(result["mode"])
    rows = [
        row
        for row in result["results"]
        if row["name"] == name and row["dtype"] == dtype and str(row[column]) == case
    ]
    if len(rows) != 1:
        raise KeyError(f"{'/'.join(keys)}: {len(rows)} rows")
    if field:
        return float(rows[0][field[0]])
    if result["mode"] in ("decode", "constant"):
        return 1e3 * float(rows[0]["seconds_per_token"])
    return float(rows[0]["tokens_per_second"])


def _mean_of_cells(cells: dict[str, Any], keys: list[str]) -> float:
    settings = dict(part.split("=") for part in keys[0].split(","))
    found = []
    for key, measured in cells.items():
        own = json.loads(key)
        if all(str(own.get(name)) == value for name, value in settings.items()):
            value: Any = measured
            for field in keys[1:]:
                value = value[field]
            found.append(float(value))
    if not found:
        raise KeyError(f"{'/'.join(keys)}: no such cell")
    return fmean(found)
