"""Ratios of tnnlm's results to those of a named baseline, measured in the same run."""

from __future__ import annotations

from typing import Any

from benchmarks.report import case_field, case_header
from experiments.report import table

BASELINES = ("llama.cpp", "llama-server", "transformers-gpt2", "transformers-llama")
"""Baselines by the beginning of their names; the first that was measured in a dtype is compared with."""


def ratio_table(result: dict[str, Any]) -> str:
    """Return a table of ratios by model of tnnlm and case; empty if no baseline was measured.

    The mode decode compares times, where tnnlm is faster below 1, the others tokens per second.
    """
    mode = result["mode"]
    field, column = "seconds_per_token" if mode == "decode" else "tokens_per_second", case_field(mode)
    values = {(row["name"], row["dtype"], row[column]): row[field] for row in result["results"]}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for (name, dtype, case), value in values.items():
        baseline = _baseline(values, dtype) if name.startswith("tnnlm") else None
        if baseline is None or (baseline, dtype, case) not in values:
            continue
        what = "ratio of times" if mode == "decode" else "ratio of tokens per second"
        line = lines.setdefault((name, dtype), {what: f"{name} / {baseline}"})
        line[case_header(mode, case)] = f"{value / values[baseline, dtype, case]:.2f}"
    return table(list(lines.values())) if lines else ""


def _baseline(values: dict[tuple[str, str, int], float], dtype: str) -> str | None:
    """Return the name of the baseline for a dtype."""
    names = [name for name, other, _ in values if other == dtype]
    found = (name for start in BASELINES for name in names if name.startswith(start))
    return next(found, None)
