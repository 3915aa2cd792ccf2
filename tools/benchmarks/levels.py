"""Benchmark of vector instructions: training and decoding with native instructions, AVX2 and no AVX.

PyTorch, oneDNN and MKL read the level when they are loaded; each measurement therefore runs in a separate
process. The results estimate an older CPU, apart from its clock rate and memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks.subjects import SHAPE, ours
from benchmarks.train_step import OURS, trainee
from experiments.report import table
from experiments.timing import interleaved, random_tokens
from tnnlm.config.loader import load_config
from tnnlm.config.schema import ModelConfig
from tnnlm.inference.linear import DTYPES
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import capability, cpu_level, describe_cpu
from tnnlm.machine.threads import limit_threads

NATIVE = "native"
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
LEVELS: dict[str, dict[str, str]] = {
    NATIVE: {},
    "AVX2": dict(zip(_VARIABLES, ("avx2", "AVX2", "AVX2"), strict=True)),
    "no AVX": dict(zip(_VARIABLES, ("default", "SSE41", "SSE4_2"), strict=True)),
}
"""Environment variables of each level."""
_CONTEXT = 128
_DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def levels_here() -> list[str]:
    """Return the levels that differ on this CPU, widest instructions first."""
    wide = cpu_level()
    return [name for name in LEVELS if name != "AVX2" or wide.startswith("AVX512")]


def measure_levels(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure training steps of the demo and decoding steps at every level of vector instructions."""
    demo = load_config(_DEMO, [])
    rounds, steps = (1, 2) if args.quick else (3, 8)
    rows = time_levels(demo.model, demo.data.batch_size, rounds, steps, shape)
    return {"mode": "levels", "cpu": describe_cpu(), "results": rows}


def time_levels(
    shape: ModelConfig, batch: int, rounds: int, steps: int, decoded: ModelConfig = SHAPE
) -> list[dict[str, Any]]:
    """Measure training throughput, and decoding time by weight dtype, at every level, interleaved.

    Args:
        shape: Configuration of the model that is trained, uncompiled, as train.py does on a CPU by default.
        batch: Rows of ``shape.max_length`` tokens per step.
        rounds: Processes per level.
        steps: Timed training steps per process; four times as many decoding steps are timed.
        decoded: Configuration of the model that decodes with the packed engine.

    Returns:
        One row per level: ``level``, ``cpu_level`` as PyTorch reports it, ``training_dtype``,
        ``tokens_per_second`` of the median training step, and ``decoding``: by dtype of the weights, the
        operator (``linear``) and ``seconds_per_token``, medians over all rounds.
    """
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in levels_here()}
    for _ in tqdm(range(rounds), desc="rounds of all levels", leave=False, disable=None):
        for name, measured in parts.items():
            with patch.dict(os.environ, LEVELS[name]), multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(_measure, (shape, batch, steps, decoded)))
    return [_row(name, measured) for name, measured in parts.items()]


def level_table(result: dict[str, Any]) -> str:
    """Return a Markdown table: training and decoding per level, and training relative to the native level."""
    rows = result["results"]
    native = rows[0]["tokens_per_second"]
    lines = []
    for row in rows:
        level, speed = row["level"], row["tokens_per_second"]
        line = {
            "level": f"native ({row['cpu_level']})" if level == NATIVE else level,
            "training tokens/s": f"{speed:,.0f} ({row['training_dtype']})",
            "relative to native": f"{speed / native:.2f}",
        }
        for dtype, decoding in row["decoding"].items():
            line[f"{dtype}, ms per token"] = (
                f"{1e3 * decoding['seconds_per_token']:.2f} ({decoding['linear']})"
            )
        lines.append(line)
    return table(lines)


def _measure(shape: ModelConfig, batch: int, steps: int, decoded: ModelConfig) -> dict[str, Any]:
    """Measure the seconds of every timed step; runs in a separate process."""
    keep_large_blocks()
    limit_threads()
    model = trainee(OURS, shape, shape.max_length, compiled=False)
    rows = random_tokens(batch, shape.max_length + 1, shape.vocab_size)
    decoding = {}
    training = interleaved({"": lambda: model.step(rows)}, steps, warm_up=2)[""]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for dtype in DTYPES:
            step = ours("balanced", "packed", dtype, decoded, Path(folder)).step_at(1, _CONTEXT).step
            seconds = interleaved({"": step}, 4 * steps, warm_up=10)[""]
            decoding[dtype] = {"linear": choose_linear(torch.device("cpu"), dtype).name, "seconds": seconds}
    return {
        "cpu_level": cpu_level(),
        "training_dtype": "bfloat16" if capability("bfloat16_arithmetic") else "float32",
        "seconds_per_token": [seconds / (batch * shape.max_length) for seconds in training],
        "decoding": decoding,
    }


def _row(level: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a level: medians over all of its processes."""
    first = measured[0]
    row = {"level": level, "cpu_level": first["cpu_level"], "training_dtype": first["training_dtype"]}
    row["tokens_per_second"] = 1 / median(s for part in measured for s in part["seconds_per_token"])
    row["decoding"] = {}
    for dtype, decoding in first["decoding"].items():
        took = median(s for part in measured for s in part["decoding"][dtype]["seconds"])
        row["decoding"][dtype] = {"linear": decoding["linear"], "seconds_per_token": took}
    return row
