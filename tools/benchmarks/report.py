"""Tables (Markdown) and plots of benchmark results, from plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import report
from experiments.report import Line, Panel, line

_X = {"batch": "rows", "serve": "concurrent streams", "prefill": "prompt tokens", "train": "tokens per row"}
_DASHES = {"float32": "-", "bfloat16": "--", "float16": "-.", "int8": ":"}

_ROWS = {"batch": "batch {:,}", "serve": "{:,} streams"}
"""Modes whose cases differ in the number of rows, and the header of such a case; others differ in context."""


def case_field(mode: str) -> str:
    """Return the field of a result that tells the cases of a mode apart: ``batch`` or ``context``."""
    return "batch" if mode in _ROWS else "context"


def case_header(mode: str, case: int) -> str:
    """Return the header of the column of a case."""
    return _ROWS.get(mode, "{:,} tokens").format(case)


def table(result: dict[str, Any]) -> str:
    """Return a table of times or throughputs by name and dtype, with a column per context or batch size."""
    mode = result["mode"]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["results"]:
        name, dtype = row["name"], row["dtype"]
        case = case_header(mode, row[case_field(mode)])
        lines.setdefault((name, dtype), {"name": name, "dtype": dtype})[case] = _cell(row, mode)
    return report.table(list(lines.values()))


def memory_table(result: dict[str, Any]) -> str:
    """Return a table of peak memory in MiB by name and length, and the convolution's share of the step."""
    lines: dict[str, dict[str, str]] = {}
    shares = {"peak MiB": "convolution's share of the step"}
    for row in result["results"]:
        name, length = row["name"], f"{row['context']:,} tokens"
        lines.setdefault(name, {"peak MiB": name})[length] = f"{row['peak_bytes'] / 2**20:,.0f}"
        if "convolution_share" in row:
            shares[length] = f"{row['convolution_share']:.0%}"
    return report.table([*lines.values(), shares])


def _cell(row: dict[str, Any], mode: str) -> str:
    if mode == "train":
        return f"{row['tokens_per_second']:,.0f} ({row['flop_share']:.0%})"
    if mode not in ("decode", "constant"):
        part = f" ({row['product_share']:.0%})" if "product_share" in row else ""
        return f"{row['tokens_per_second']:,.0f}{part}"
    share = f" ({row['bandwidth_share']:.0%})" if "bandwidth_share" in row else ""
    return f"{1e3 * row['seconds_per_token']:.2f}{share}"


def _family(name: str) -> str:
    """Return the name that selects the colour; llama.cpp's names include the dtype, which the dashes show."""
    return "llama.cpp" if name.startswith("llama.cpp") else name


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot time per token by context length, or tokens per second by batch size or prompt length."""
    rows, mode = result["results"], result["mode"]
    key, in_time = case_field(mode), mode in ("decode", "constant")
    names = list(dict.fromkeys(_family(row["name"]) for row in rows))
    lines: list[Line] = []
    for name, dtype in dict.fromkeys((row["name"], row["dtype"]) for row in rows):
        points = [
            (row[key], 1e3 * row["seconds_per_token"] if in_time else row["tokens_per_second"])
            for row in rows
            if (row["name"], row["dtype"]) == (name, dtype)
        ]
        colour = f"C{names.index(_family(name)) % 10}"
        lines.append(line(f"{name}, {dtype}", points, color=colour, linestyle=_DASHES[dtype]))
    if "floor_seconds" in result:
        style = {"color": "grey", "linestyle": "--"}
        lines.append(Line("memory bandwidth floor", y=[1e3 * result["floor_seconds"]], style=style))
    axes = {
        "xlabel": _X.get(mode, "context length (tokens)"),
        "ylabel": "ms per token" if in_time else "tokens per second",
        "xscale": "log",
        "yscale": "log",
    }
    ticks: dict[float, str] = {x: f"{x:,}" for x in sorted({row[key] for row in rows})}
    report.figure([Panel("", lines, axes=axes, base=2, ticks=ticks)], path, size=(8, 4.8), dpi=140)
