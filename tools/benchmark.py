#!/usr/bin/env python
"""Time a converted model of 24M weights beside Llama, GPT-2 and Mamba of transformers, and llama.cpp.

All subjects take turns in one run; medians, quartiles, and the bandwidth the machine was measured to
read memory with. Random weights: speed does not depend on them. ``train`` times whole training steps beside
GPT-2 of as many parameters and a TNN as tnn-pytorch computes it.

Examples:
  python tools/benchmark.py decode                       # time per token against context
  python tools/benchmark.py prefill --quick              # prompts, smaller and fewer, in about a minute
  python tools/benchmark.py batch --json batch.json --png batch.png
  python tools/benchmark.py train                        # tokens per second, memory, the convolution's share
  python tools/benchmark.py constant runs/demo           # a model's time per token and state, by context
  python tools/benchmark.py levels                       # this CPU with and without AVX-512, AVX2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.levels import level_table, time_levels
from benchmarks.llama_cpp import llama_cpp
from benchmarks.report import memory_table, plot, table
from benchmarks.subjects import PEERS, SHAPE, WIDTHS, linear_weights, ours, peer
from benchmarks.train_step import time_training
from experiments import report
from experiments.timing import (
    QUICK,
    Effort,
    Subject,
    interleaved,
    read_bandwidth,
    row,
    time_prefill,
    time_steps,
)
from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.config.loader import load_config
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError, run_script
from tnnlm.files import write_text
from tnnlm.inference.engine import ENGINES as LOADED
from tnnlm.inference.engine import open_engine
from tnnlm.inference.generator import GenerationState, TextGenerator
from tnnlm.inference.linear import DTYPES
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import capability, describe_cpu
from tnnlm.machine.threads import limit_threads
from tnnlm.models.causal_lm import state_bytes

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
LLAMA_CPP = "llama.cpp"
ONNX = "onnxruntime"
ENGINES = ("compiled", "packed", "eager", ONNX)
CONTEXTS = (128, 512, 2048, 8192)
BATCH_CONTEXT = 128
LONGEST_PEER = 8192
"""tokens of a row that all models train on"""
OURS = {
    "decode": [
        *(("balanced", engine, "float32") for engine in ENGINES),
        *(("balanced", engine, dtype) for engine in ("compiled", "packed") for dtype in ("bfloat16", "int8")),
        *((conversion, "packed", "float32") for conversion in ("etsc512", "window512")),
    ],
    "prefill": [("balanced", "packed", dtype) for dtype in ("float32", "bfloat16", "int8")],
    "batch": [
        *(("balanced", "packed", dtype) for dtype in ("float32", "bfloat16", "int8")),
        *((conversion, "packed", "float32") for conversion in ("etsc512", "window512")),
    ],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=(*OURS, "train", "constant", "levels"), help="what is timed")
    parser.add_argument("model", nargs="?", help="of constant: folder, run or checkpoint (default: newest)")
    parser.add_argument("--quick", action="store_true", help="less of everything, nothing compiled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them here")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help="tokens (default: 128 to 8,192)")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="rows (default: 1 to 256)")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=(LLAMA_CPP, *PEERS),
        choices=(LLAMA_CPP, *PEERS),
        help="default: all; without a name: none",
    )
    parser.add_argument(
        "--engines", nargs="+", default=ENGINES, choices=ENGINES, help="of ours (default: all)"
    )
    parser.add_argument(
        "--engine", choices=LOADED, default="auto", help="of constant (default: the fastest there is)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of constant: of the weights")
    parser.add_argument("--d-model", type=int, default=SHAPE.d_model, metavar="D", help="default: 512")
    args = parser.parse_args()
    if args.model and args.mode != "constant":
        raise UserError(f"{args.model}: a model is timed by the mode constant")
    for number in (*(args.contexts or ()), *(args.batches or ()), args.d_model):
        if not 1 <= number <= 1 << 20:
            raise UserError(f"{number}: must be from 1 to {1 << 20:,}")
    return args


def main() -> int:
    args = parse()
    keep_large_blocks()
    limit_threads()
    shape = replace(SHAPE, d_model=args.d_model, glu_dim=args.d_model)
    if args.mode == "levels" and args.png:
        raise UserError("--png: the levels are a table alone")
    result = {"train": training, "levels": levels, "constant": constant}.get(args.mode, decoding)(args, shape)
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    if args.png:
        plot(result, args.png)
    show(result)
    return 0


def training(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Steps, on rows of every length."""
    lengths = args.contexts or ((512, 2048) if args.quick else (512, 2048, 8192, 65_536))
    rounds, longest = (3, 2048) if args.quick else (5, LONGEST_PEER)
    rate, rows = time_training(shape, lengths, rounds, not args.quick, longest)
    return {
        "mode": "train",
        "cpu": describe_cpu(),
        "bandwidth_gbs": read_bandwidth(),
        "gemm_flops": rate,
        "results": rows,
    }


def levels(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """The demo's training steps and single decoding steps, at every level of instructions."""
    demo = load_config(DEMO, [])
    rounds, steps = (1, 2) if args.quick else (3, 8)
    rows = time_levels(demo.model, demo.data.batch_size, rounds, steps, shape)
    return {"mode": "levels", "cpu": describe_cpu(), "results": rows}


def constant(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Greedy steps of a trained model after contexts of every length, which take turns: constant, or not?"""
    turns, steps = (3, 4) if args.quick else (15, 16)
    folder, converted = load_for_decoding(args.model, Path("runs"))
    weights = linear_weights(converted.model) + converted.model.embedding.weight.numel()
    writer, info = open_engine(converted, folder, dtype=args.dtype, engine=args.engine)
    vocabulary = converted.tokenizer.size
    read = {
        n: writer.prefill_tokens([torch.arange(n).remainder(vocabulary).tolist()])
        for n in args.contexts or CONTEXTS
    }
    cases = {n: partial(take_steps, writer, context, steps) for n, context in read.items()}
    times = interleaved(cases, turns, warm_up=2)
    rows = [
        row("recurrent step", args.dtype, 1, n, [seconds / steps for seconds in times[n]])
        | {"state_bytes": state_bytes(context.model_state), "prefill_seconds": context.seconds}
        for n, context in read.items()
    ]
    bandwidth = read_bandwidth()
    touched = weights * WIDTHS[args.dtype] + 2 * rows[0]["state_bytes"]  # by every token
    return {
        "mode": "constant",
        "cpu": describe_cpu(),
        "model": str(folder),
        "engine": str(info),
        "bandwidth_gbs": bandwidth,
        "floor_seconds": touched / (1e9 * bandwidth),
        "ratio_longest_to_shortest": rows[-1]["seconds_per_token"] / rows[0]["seconds_per_token"],
        "results": rows,
    }


@torch.inference_mode()
def take_steps(writer: TextGenerator, context: GenerationState, n: int) -> None:
    """Greedy tokens on top of ``context``, which stays as it is."""
    state, token = context.model_state, context.logits.argmax(-1)
    for _ in range(n):
        logits, state = writer.model.step(token, state)
        token = logits.argmax(-1)


def decoding(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Steps or prompts of converted models and peers."""
    contexts = args.contexts or ((128, 2048) if args.quick else CONTEXTS)
    batches = args.batches or ((1, 16) if args.quick else (1, 4, 16, 64, 256))
    effort = QUICK if args.quick else Effort()
    with tempfile.TemporaryDirectory() as folder:
        longest, most = (BATCH_CONTEXT, max(batches)) if args.mode == "batch" else (max(contexts), 1)
        subjects = gather(args, shape, longest, most, Path(folder))
        if args.mode == "prefill":
            bandwidth = read_bandwidth()
            rows = time_prefill(subjects, contexts, shape.vocab_size, effort)
        else:
            cases = [(1, n) for n in contexts] if args.mode == "decode" else []
            cases += [(b, BATCH_CONTEXT) for b in batches] if args.mode == "batch" else []
            bandwidth, rows = time_steps(subjects, cases, effort)
    return {
        "mode": args.mode,
        "cpu": describe_cpu(),
        "bandwidth_gbs": bandwidth,
        "results": rows,
    }


def show(result: dict[str, Any]) -> None:
    """The limit that was measured, and the table."""
    mode = result["mode"]
    print(result["cpu"])
    if mode == "levels":
        print(f"\n{level_table(result['results'])}")
        return
    if mode == "train":
        print(
            "tokens per second (share of the FLOP rate); matrices are multiplied at "
            f"{result['gemm_flops'] / 1e9:,.0f} GFLOP/s\n\n{table(result)}\n\n{memory_table(result)}"
        )
        return
    if mode == "constant":
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
        print(
            f"{result['model']}, {result['engine']}\n\n{report.table(lines)}\n\nlongest over shortest "
            f"context: {result['ratio_longest_to_shortest']:.3f} times the time per token\nfloor: "
            f"{1e3 * result['floor_seconds']:.3f} ms at {result['bandwidth_gbs']:.1f} GB/s read bandwidth"
        )
        return
    what = {"decode": "ms per token (share of the bandwidth)"}.get(mode, "tokens per second")
    print(f"{what}; memory is read at {result['bandwidth_gbs']:.1f} GB/s\n\n{table(result)}")


def gather(
    args: argparse.Namespace, shape: ModelConfig, longest: int, rows: int, folder: Path
) -> list[Subject]:
    """Ours, then the peers; what can't be had is left out with a line."""
    wanted = [case for case in OURS[args.mode] if case[1] in args.engines]
    if args.quick:
        wanted = [case for case in wanted if case[1] != "compiled"]
    compiler = capability("cpp_compiler")
    if not compiler and any(case[1] == "compiled" for case in wanted):
        left_out("compiled engines", f"there is no C++ compiler ({compiler.reason})")
        wanted = [case for case in wanted if case[1] != "compiled"]
    subjects = []
    for case in tqdm(wanted, desc="converting and compiling", leave=False, disable=None):
        try:
            subjects.append(ours(*case, shape, folder))
        except UserError as error:
            if case[1] != ONNX:
                raise
            left_out(ONNX, str(error))
    for kind in args.peers:
        if kind == "mamba" and args.mode == "prefill":
            left_out(kind, "it reads prompts in a loop without its GPU kernels")
            continue
        try:
            for dtype in peer_dtypes(kind, args.quick):
                if kind == LLAMA_CPP:
                    subjects.append(llama_cpp(dtype, shape, longest, rows, folder))
                else:
                    subjects.append(peer(kind, dtype, shape, longest))
        except UserError as error:
            left_out(kind, str(error))
    return subjects


def peer_dtypes(kind: str, quick: bool) -> tuple[str, ...]:
    if kind == LLAMA_CPP:
        return ("float32",) if quick else ("float32", "bfloat16", "int8")
    return ("float32",) if kind == "mamba" or quick else ("float32", "bfloat16")


def left_out(what: str, why: str) -> None:
    print(f"left out: {what}: {why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(main))
