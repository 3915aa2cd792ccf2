"""Report of tools/gpu_check.py: a record for ``docs/records`` and its tables as Markdown.

It needs the standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_checks.rows import Row
from gpu_checks.runner import Outcome

Texts = dict[str, str]
TITLES = {
    "parts": "Parts",
    "card": "Rates of the card",
    "correctness": "Correctness",
    "training": "Training",
    "decoding": "Decoding, weights in bfloat16",
    "memory": "Peak memory of training",
    "tests": "Tests of the repository",
}
"""Headings of the tables, in their order."""
_UNKNOWN = "unknown"


def record(outcomes: Sequence[Outcome], command: str, date: str, commit: str) -> dict[str, Any]:
    """Return the results as a record of ``docs/records``, with all rows.

    Args:
        outcomes: Outcomes of the parts so far.
        command: Command line.
        date: Date, YYYY-MM-DD.
        commit: Abbreviated commit.
    """
    rows = [row for outcome in outcomes for row in outcome.rows]
    machine = next((row for row in rows if row["kind"] == "machine"), {})
    return {
        "command": command,
        "machine": machine.get("name", _UNKNOWN),
        "cpu_level": machine.get("cpu_level", _UNKNOWN),
        "torch": machine.get("torch", _UNKNOWN),
        "date": date,
        "commit": commit,
        "tables": tables(outcomes, rows),
        "rows": rows,
    }


def tables(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> dict[str, list[Texts]]:
    """Return the tables that have rows, as cells by column."""
    rates = {row["name"]: row for row in rows if row["kind"] == "card"}
    product = rates.get("matrix product, bfloat16", {}).get("flops")
    copy = rates.get("copy", {}).get("bytes_per_second")
    found = {
        "parts": [
            {"part": one.part, "result": one.status, "seconds": f"{one.seconds:.0f}"} for one in outcomes
        ],
        "card": [_card(row) for row in rates.values()],
        "correctness": [_correctness(row) for row in _of("correctness", rows)],
        "training": [_training(row, product, copy) for row in _of("training", rows)],
        "decoding": [_decoding(row, copy) for row in _of("decoding", rows)],
        "memory": [_memory(row) for row in _of("memory", rows)],
        "tests": [{"test": row["name"], "result": row["outcome"]} for row in _of("tests", rows)],
    }
    return {name: table for name, table in found.items() if table}


def markdown(found: dict[str, list[Texts]]) -> str:
    """Return all tables as Markdown with headings."""
    parts = [f"## {TITLES[name]}\n\n{table(found[name])}" for name in TITLES if name in found]
    return "\n\n".join(parts) + "\n"


def table(items: Sequence[Texts]) -> str:
    """Return a table as Markdown, with a dash for each missing cell."""
    columns = list(dict.fromkeys(column for item in items for column in item))
    lines = [columns, ["---"] * len(columns)]
    lines += [[item.get(column, "-").replace("|", "/") for column in columns] for item in items]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def replace_text(path: Path, text: str) -> None:
    """Write a file such that it is complete at any time, also if this process is killed."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Return whether a part failed, a result is wrong, or a test fails."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    return (
        any(outcome.status.startswith("failed") for outcome in outcomes)
        or any(not row["passed"] for row in _of("correctness", rows))
        or any(row["outcome"] == "failed" for row in _of("tests", rows))
        or any("failed" in row for row in rows)
    )


def _of(kind: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _card(row: Row) -> Texts:
    if "flops" in row:
        return {"rate": row["name"], "value": f"{row['flops'] / 1e12:,.3g}", "unit": "TFLOP/s"}
    return {"rate": row["name"], "value": f"{row['bytes_per_second'] / 1e9:,.4g}", "unit": "GB/s"}


def _correctness(row: Row) -> Texts:
    verdict = "ok" if row["passed"] else "WRONG"
    return {
        "comparison": row["name"],
        "error": f"{row['error']:.1e}",
        "limit": f"{row['limit']:.0e}",
        "result": verdict,
    }


def _training(row: Row, product: float | None, copy: float | None) -> Texts:
    cells = {"model": row["shape"], "variant": row["variant"]}
    if "failed" in row:
        return cells | {"tokens/s": row["failed"]}
    return cells | {
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "steps": str(row["steps"]),
        "TFLOP/s": f"{row['flops'] / 1e12:,.3g}",
        "of the matrix rate": _share(row["flops"], product),
        "of the copy rate, at least": _share(row.get("bytes_per_second"), copy),
    }


def _decoding(row: Row, copy: float | None) -> Texts:
    return {
        "model": row["shape"],
        "engine": row["engine"],
        "batch": str(row["batch"]),
        "ms per step": f"{1e3 * row['seconds_per_step']:.3g}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "of the copy rate": _share(row["bytes_per_second"], copy),
    }


def _memory(row: Row) -> Texts:
    cells = {
        "model": row["shape"],
        "variant": row["variant"],
        "estimated GiB": f"{row['estimated'] / 2**30:.3g}",
    }
    if "failed" in row:
        return cells | {"measured GiB": row["failed"]}
    if row["measured"] is None:
        return cells
    ratio = f"{row['estimated'] / row['measured']:.2f}"
    return cells | {"measured GiB": f"{row['measured'] / 2**30:.3g}", "estimated / measured": ratio}


def _share(value: float | None, whole: float | None) -> str:
    return "-" if not value or not whole else f"{value / whole:.0%}"
