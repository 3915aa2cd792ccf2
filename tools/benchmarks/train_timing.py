"""Times of training steps, in turns, beside the rate at which the machine multiplies matrices."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.timing import quartile_range
from benchmarks.training import NAMES, OURS, WITHOUT, Trainee, trainee
from tnnlm.config.schema import ModelConfig
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import capability
from tnnlm.machine.resident import resident_peak
from tnnlm.machine.threads import limit_threads

TOKENS = 4096
"""per step, or one row where that is longer"""
RECOMPUTED = 32_768
"""tokens of a row from which on ours computes the activations again in the backward pass"""
_GEMM = 2048


def time_training(
    shape: ModelConfig, lengths: Sequence[int], rounds: int, compiled: bool, longest_peer: int
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds per token of a training step, for every model and length.

    Args:
        shape: of our model.
        lengths: tokens per row; rows are as many as make ``TOKENS``.
        rounds: timed steps of each, in turns, after some that warm up; two where rows are ``RECOMPUTED``.
        compiled: by torch.compile.
        longest_peer: above, ours alone is timed.

    Returns:
        FLOP/s of large matrix products (median over the rounds), and rows: ``name``, ``dtype``,
        ``batch``, ``context``, ``seconds_per_token``, ``tokens_per_second``, ``spread``, ``params``,
        ``flop_share`` (of matrix products, over that rate), ``peak_bytes`` of a process that takes
        two such steps, and for ours ``convolution_share``: what a step without it saves.

    Raises:
        UserError: if ``transformers`` is missing.
    """
    rates: list[float] = []
    rows: list[dict[str, Any]] = []
    for length in lengths:
        names = NAMES if length <= longest_peer else (OURS,)
        data = _rows(shape, length)
        models = {}
        for name in tqdm(names, desc=f"building, {length} tokens", leave=False, disable=None):
            models[name] = _ready(name, shape, length, compiled)
            for _ in range(2 if length < RECOMPUTED else 1):
                models[name].step(data)
        times: dict[str, list[float]] = {name: [] for name in names}
        turns = rounds if length < RECOMPUTED else 2
        for _ in tqdm(range(turns), desc=f"rows of {length} tokens", leave=False, disable=None):
            rates.append(_gemm_rate())
            for name, model in models.items():
                started = time.perf_counter()
                model.step(data)
                times[name].append((time.perf_counter() - started) / data[:, 1:].numel())
        for name, model in models.items():
            rows.append(_row(model, data, times[name]))
        if WITHOUT in times:
            ours = next(row for row in rows if (row["name"], row["context"]) == (OURS, length))
            ours["convolution_share"] = 1 - statistics.median(times[WITHOUT]) / statistics.median(times[OURS])
        del models
    rate = statistics.median(rates)
    for row in tqdm(rows, desc="peak memory", leave=False, disable=None):
        row["flop_share"] = row.pop("flops_per_token") * row["tokens_per_second"] / rate
        row["peak_bytes"] = peak_bytes(row["name"], shape, row["context"], compiled)
    return rate, rows


def peak_bytes(name: str, shape: ModelConfig, length: int, compiled: bool) -> int:
    """Most memory that two training steps held, beyond the loaded libraries: in a process of their own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, shape, length, compiled))


def _peak(name: str, shape: ModelConfig, length: int, compiled: bool) -> int:
    before = resident_peak()
    keep_large_blocks()
    limit_threads()
    model, data = _ready(name, shape, length, compiled), _rows(shape, length)
    for _ in range(2):
        model.step(data)
    return resident_peak() - before


def _ready(name: str, shape: ModelConfig, length: int, compiled: bool) -> Trainee:
    return trainee(name, shape, length, compiled, recompute=length >= RECOMPUTED)


def _rows(shape: ModelConfig, length: int) -> Tensor:
    """Random token ids (B, L + 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab_size, (max(1, TOKENS // length), length + 1), generator=generator)


def _row(model: Trainee, data: Tensor, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "name": model.name,
        "dtype": "bfloat16" if capability("bfloat16_arithmetic") else "float32",
        "batch": data.shape[0],
        "context": data.shape[1] - 1,
        "seconds_per_token": median,
        "tokens_per_second": 1 / median,
        "spread": quartile_range(seconds),
        "params": model.params,
        "flops_per_token": 6.0 * model.matrix_weights,
    }


def _gemm_rate() -> float:
    """FLOP/s of a large product in the dtype of the training, the best of three."""
    dtype = torch.bfloat16 if capability("bfloat16_arithmetic") else torch.float32
    a, b = (torch.ones(_GEMM, _GEMM, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2.0 * _GEMM**3 / min(times)
