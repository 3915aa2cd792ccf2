#!/usr/bin/env python
"""Time per token and state size against the length of the context: constant, or not?

Contexts take turns (interleaved), medians are shown, and beside them the machine's floor: the bytes that
one token must touch over the measured read bandwidth.

Examples:
  python tools/constant_cost.py                              # the newest converted model
  python tools/constant_cost.py runs/demo --contexts 128 8192 --json cost.json --png cost.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.subjects import WIDTHS, linear_weights
from benchmarks.timing import read_bandwidth
from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.errors import UserError, run_script
from tnnlm.files import write_text
from tnnlm.inference.engine import ENGINES, open_engine
from tnnlm.inference.generator import Context, TextGenerator
from tnnlm.inference.linear import DTYPES
from tnnlm.machine.capabilities import describe_cpu
from tnnlm.machine.threads import limit_threads
from tnnlm.models.causal_lm import state_bytes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="converted folder, run or checkpoint (default: the newest)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192], metavar="N")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each context (default: 15)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens timed per turn (default: 16)")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="default: the fastest there is")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    args = parser.parse_args()
    if min(*args.contexts, args.repeats, args.tokens, 10**9) < 1:
        raise UserError("contexts, repeats and tokens must be 1 or more")
    return args


def main() -> int:
    args = parse()
    limit_threads()
    folder, converted = load_for_decoding(args.model, Path("runs"))
    tokenizer = converted.tokenizer
    weights = linear_weights(converted.model) + converted.model.embedding.weight.numel()
    writer, info = open_engine(converted, folder, dtype=args.dtype, engine=args.engine)
    contexts = {
        n: writer.read_tokens([torch.arange(n).remainder(tokenizer.size).tolist()]) for n in args.contexts
    }
    times: dict[int, list[float]] = {n: [] for n in contexts}
    for turn in tqdm(range(args.repeats + 2), desc="turns", disable=None):
        for n, context in contexts.items():
            seconds = time_steps(writer, context, args.tokens)
            if turn >= 2:  # the first two warm up
                times[n].append(seconds)
    about = {"engine": str(info), "cpu": describe_cpu()}
    result = about | summarise(weights * WIDTHS[args.dtype], contexts, times)
    show(folder, result)
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    if args.png:
        plot(args.png, result)
    return 0


@torch.inference_mode()
def time_steps(writer: TextGenerator, context: Context, n: int) -> float:
    """Seconds per greedy token on top of ``context``, which stays as it is."""
    state, token = context.state, context.logits.argmax(-1)
    started = time.perf_counter()
    for _ in range(n):
        logits, state = writer.model.step(token, state)
        token = logits.argmax(-1)
    return (time.perf_counter() - started) / n


def summarise(
    weight_bytes: int, contexts: dict[int, Context], times: dict[int, list[float]]
) -> dict[str, Any]:
    """Medians, spreads, sizes and the floor."""
    rows = []
    for n, context in contexts.items():
        state = state_bytes(context.state)
        ordered = sorted(times[n])
        spread = (ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]) / statistics.median(ordered)
        rows.append(
            {
                "context": n,
                "seconds_per_token": statistics.median(ordered),
                "spread": spread,
                "prefill_seconds": context.seconds,
                "state_bytes": state,
            }
        )
    bandwidth = read_bandwidth()  # GB/s
    return {
        "bandwidth_gbs": bandwidth,
        "floor_seconds": (weight_bytes + 2 * rows[0]["state_bytes"]) / (1e9 * bandwidth),
        "ratio_longest_to_shortest": rows[-1]["seconds_per_token"] / rows[0]["seconds_per_token"],
        "results": rows,
    }


def show(folder: Path, result: dict[str, Any]) -> None:
    print(f"{folder}, {result['engine']}\n{result['cpu']}")
    print(f"{'context':>9} {'ms per token':>13} {'quartiles':>10} {'prefill s':>10} {'state bytes':>12}")
    for row in result["results"]:
        print(
            f"{row['context']:>9,} {1e3 * row['seconds_per_token']:>13.3f} {row['spread']:>10.1%} "
            f"{row['prefill_seconds']:>10.3f} {row['state_bytes']:>12,}"
        )
    print(
        f"longest over shortest context: {result['ratio_longest_to_shortest']:.3f} times the time per token"
    )
    print(
        f"floor: {1e3 * result['floor_seconds']:.3f} ms at {result['bandwidth_gbs']:.1f} GB/s read bandwidth"
    )


def plot(path: Path, result: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = result["results"]
    axis.plot(
        [r["context"] for r in rows],
        [1e3 * r["seconds_per_token"] for r in rows],
        "o-",
        label="recurrent step",
    )
    axis.axhline(1e3 * result["floor_seconds"], color="grey", linestyle="--", label="memory bandwidth floor")
    axis.set(xscale="log", xlabel="context in tokens", ylabel="ms per token", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(run_script(main))
