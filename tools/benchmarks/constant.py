"""Benchmark of a trained model: time per token and size of the state, which do not depend on the context."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.subjects import WIDTHS, linear_weights
from experiments.report import table
from experiments.timing import interleaved, read_bandwidth, row
from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.cli.usage import trust_of
from tnnlm.config.schema import ModelConfig
from tnnlm.inference.engine import open_engine
from tnnlm.inference.generator import GenerationState, TextGenerator
from tnnlm.machine.capabilities import describe_cpu
from tnnlm.models.causal_lm import state_bytes
from tnnlm.trust import Trust

CONTEXTS = (128, 512, 2048, 8192)
"""Context lengths in tokens by default."""


def measure_constant(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure greedy steps of a trained model after contexts of every length."""
    turns, steps = (3, 4) if args.quick else (15, 16)
    contexts, trust = args.contexts or CONTEXTS, trust_of(args)
    measured = time_constant(args.model, contexts, turns, steps, args.dtype, args.engine, trust)
    return {"mode": "constant", "cpu": describe_cpu(), **measured}


def time_constant(
    model: str | None, contexts: Sequence[int], turns: int, steps: int, dtype: str, engine: str, trust: Trust
) -> dict[str, Any]:
    """Measure greedy steps of a trained model after contexts of every length, interleaved.

    Args:
        model: Folder, run or checkpoint; None is the newest run.
        contexts: Lengths in tokens.
        turns: Number of measurements of each length.
        steps: Number of steps of a measurement.
        dtype: Dtype of the weights.
        engine: Engine that decodes.
        trust: Whether code that the model carries or names may run.

    Returns:
        Model, engine, bandwidth, lower bound of the time per token, and a row per length, as plain data.
    """
    folder, converted = load_for_decoding(model, Path("runs"), trust)
    weights = linear_weights(converted.model) + converted.model.embedding.weight.numel()
    writer, info = open_engine(converted, folder, dtype=dtype, engine=engine, trust=trust)
    vocabulary = converted.tokenizer.size
    read = {n: writer.prefill_tokens([torch.arange(n).remainder(vocabulary).tolist()]) for n in contexts}
    cases = {n: partial(take_steps, writer, context, steps) for n, context in read.items()}
    times = interleaved(cases, turns, warm_up=2)
    rows = [
        row("recurrent step", dtype, 1, n, [seconds / steps for seconds in times[n]])
        | {"state_bytes": state_bytes(context.model_state), "prefill_seconds": context.seconds}
        for n, context in read.items()
    ]
    bandwidth = read_bandwidth()
    touched = weights * WIDTHS[dtype] + 2 * rows[0]["state_bytes"]  # bytes read or written per token
    return {
        "model": str(folder),
        "engine": str(info),
        "bandwidth_gbs": bandwidth,
        "floor_seconds": touched / (1e9 * bandwidth),
        "ratio_longest_to_shortest": rows[-1]["seconds_per_token"] / rows[0]["seconds_per_token"],
        "results": rows,
    }


@torch.inference_mode()
def take_steps(writer: TextGenerator, context: GenerationState, n: int) -> None:
    """Decode ``n`` greedy tokens after ``context``, which is not changed."""
    state, token = context.model_state, context.logits.argmax(-1)
    for _ in range(n):
        logits, state = writer.model.step(token, state)
        token = logits.argmax(-1)


def constant_table(result: dict[str, Any]) -> str:
    """Return the model, a table with a row per context, and the ratio of times with their lower bound."""
    lines = [
        {
            "context": f"{one['context']:,}",
            "ms per token": f"{1e3 * one['seconds_per_token']:.3f}",
            "quartiles": f"{one['spread']:.1%}",
            "prefill s": f"{one['prefill_seconds']:.3f}",
            "state bytes": f"{one['state_bytes']:,}",
        }
        for one in result["results"]
    ]
    return (
        f"{result['model']}, {result['engine']}\n\n{table(lines)}\n\ntime per token, longest over "
        f"shortest context: {result['ratio_longest_to_shortest']:.3f}\nlower bound: "
        f"{1e3 * result['floor_seconds']:.3f} ms at {result['bandwidth_gbs']:.1f} GB/s read bandwidth"
    )
