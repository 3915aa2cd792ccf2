"""Bounds of speed and memory that follow from data sheets and shapes, where nothing has been measured."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gpu_checks.decoding import BATCHES, step_bytes
from gpu_checks.report import Texts
from gpu_checks.shapes import DEMO, LARGE, MEDIUM, SMALL
from gpu_checks.training import least_traffic
from tnnlm.training.estimate import estimate_run
from tnnlm.training.flops import flops_per_token
from tnnlm.training.memory import estimate_memory


class Card(NamedTuple):
    """Rates of a GPU according to its data sheet."""

    name: str
    flops: float
    """Dense bfloat16 products, FLOP/s."""
    bandwidth: float
    """Memory, bytes/s."""


CARDS = (Card("H100 SXM", 989e12, 3.35e12), Card("H200", 989e12, 4.8e12))


def arithmetic_record(command: str, date: str, commit: str) -> dict[str, Any]:
    """Return a record of ``docs/records`` with the tables ``training`` and ``decoding``."""
    return {
        "command": command,
        "machine": "no GPU: arithmetic from data sheets",
        "cpu_level": "any",
        "torch": torch.__version__.partition("+")[0],
        "date": date,
        "commit": commit,
        "tables": {"training": _training(), "decoding": _decoding()},
    }


def _training() -> list[Texts]:
    rows = []
    for shape in (DEMO, SMALL, MEDIUM, LARGE):
        flops = flops_per_token(shape.model, shape.batch_size)
        config = shape.config("cuda", "bf16-mixed")
        params, memory = estimate_run(config).params, estimate_memory(config)
        row = {
            "model": shape.name,
            "parameters": f"{params:,}",
            "GFLOP per token": f"{flops / 1e9:.3f}",
            "estimated GiB": f"{memory.peak / 2**30:.1f}",
        }
        tokens = shape.batch_size * shape.model.max_length
        row["tokens/s, products alone"] = f"{CARDS[0].flops / flops:,.0f}"
        for card in CARDS:
            row[f"{card.name}: tokens/s, memory alone"] = (
                f"{tokens * card.bandwidth / least_traffic(memory, params):,.0f}"
            )
        rows.append(row)
    return rows


def _decoding() -> list[Texts]:
    rows = []
    for shape in (SMALL, LARGE):
        for batch in BATCHES:
            moved = step_bytes(shape.model, batch)
            row = {"model": shape.name, "batch": str(batch), "MB per step": f"{moved / 1e6:,.0f}"}
            for card in CARDS:
                row[f"{card.name}: ms per step"] = f"{1e3 * moved / card.bandwidth:.3g}"
                row[f"{card.name}: tokens/s"] = f"{batch * card.bandwidth / moved:,.0f}"
            rows.append(row)
    return rows
