#!/usr/bin/env python
"""Benchmark converted models of 24M weights against Llama, GPT-2 and Mamba of transformers, and llama.cpp.

Modes:
  decode    milliseconds per token by context length
  prefill   prompt tokens per second by prompt length, next to the matrix products of tnnlm alone
  batch     generated tokens per second by batch size
  train     tokens per second and peak memory of training steps, next to GPT-2 of equal parameters and a TNN
            with the operations of tnn-pytorch
  constant  time per token and state size of a trained model by context length
  levels    training and decoding with the native instructions of this CPU, with AVX2 and without AVX

Cases are interleaved; the table shows medians, with the measured memory bandwidth or FLOP rate as the limit.
Except for constant, models have random weights: speed does not depend on them.

Examples:
  python tools/benchmark.py decode
  python tools/benchmark.py prefill --quick              # shorter prompts, about a minute
  python tools/benchmark.py batch --json batch.json --png batch.png
  python tools/benchmark.py decode --contexts 512 --engines packed eager
  python tools/benchmark.py train
  python tools/benchmark.py constant runs/demo
  python tools/benchmark.py levels

Needs: pip install `'tnnlm[peers]'`; for llama.cpp also 'tnnlm[llama-cpp]', for onnxruntime 'tnnlm[onnx]'
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.constant import constant_table, time_constant
from benchmarks.levels import level_table, time_levels
from benchmarks.llama_cpp import llama_cpp
from benchmarks.prefill import products, with_shares
from benchmarks.report import memory_table, plot, table
from benchmarks.subjects import PEERS, SHAPE, ours, peer
from benchmarks.train_step import time_training
from experiments.timing import QUICK, Effort, Subject, read_bandwidth, time_prefill, time_steps
from tnnlm.cli.usage import add_trust, trust_of
from tnnlm.config.loader import load_config
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import check_file, write_text
from tnnlm.inference.engine import ENGINES as LOADED
from tnnlm.inference.linear import DTYPES
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import capability, describe_cpu
from tnnlm.machine.threads import limit_threads

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
LLAMA_CPP = "llama.cpp"
ONNX = "onnxruntime"
ENGINES = ("compiled", "packed", "eager", ONNX)
CONTEXTS = (128, 512, 2048, 8192)
BATCH_CONTEXT = 128
LONGEST_PEER = 8192
"""Longest rows, in tokens, on which the baselines are trained; on longer ones only tnnlm is."""
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
    """Return the checked arguments of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=(*OURS, "train", "constant", "levels"), help="Kind of measurement.")
    parser.add_argument(
        "model", nargs="?", help="Model of constant: folder, run or checkpoint. (default: newest)"
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="Write the results as JSON.")
    add("--png", type=Path, metavar="FILE", help="Plot the results (all modes but levels).")
    add = parser.add_argument_group("cases").add_argument
    add("--quick", action="store_true", help="Measure fewer cases and repetitions, nothing compiled.")
    add("--contexts", type=int, nargs="+", metavar="N", help="Lengths in tokens. (default: 128 to 8,192)")
    add("--batches", type=int, nargs="+", metavar="B", help="Batch sizes of batch. (default: 1 to 256)")
    add("--d-model", type=int, default=SHAPE.d_model, metavar="D", help="Width of the models. (default: 512)")
    add = parser.add_argument_group("models of decode, prefill and batch").add_argument
    known = (LLAMA_CPP, *PEERS)
    add(
        "--peers",
        nargs="*",
        default=known,
        choices=known,
        help="Baselines; none without a name. (default: all)",
    )
    add("--engines", nargs="+", default=ENGINES, choices=ENGINES, help="Engines of tnnlm. (default: all)")
    add = parser.add_argument_group("model of constant").add_argument
    add("--engine", choices=LOADED, default="auto", help="Engine; auto is the fastest. (default: auto)")
    add("--dtype", choices=DTYPES, default="float32", help="Dtype of the weights. (default: float32)")
    add_trust(add)
    args = parser.parse_args()
    if args.model and args.mode != "constant":
        raise UserError(f"{args.model}: a model can only be given in the mode constant")
    for number in (*(args.contexts or ()), *(args.batches or ()), args.d_model):
        if not 1 <= number <= 1 << 20:
            raise UserError(f"{number}: must be from 1 to {1 << 20:,}")
    return args


def main() -> int:
    """Measure one mode, write the results and print them; return the exit code."""
    args = parse()
    keep_large_blocks()
    limit_threads()
    shape = replace(SHAPE, d_model=args.d_model, glu_dim=args.d_model)
    if args.mode == "levels" and args.png:
        raise UserError("--png: the mode levels has no plot")
    for path in filter(None, (args.json, args.png)):
        check_file(path)
    result = {"train": training, "levels": levels, "constant": constant}.get(args.mode, decoding)(args, shape)
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    if args.png:
        plot(result, args.png)
    show(result)
    return 0


def training(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure training steps on rows of every length."""
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
    """Measure training steps of the demo and decoding steps at every level of vector instructions."""
    demo = load_config(DEMO, [])
    rounds, steps = (1, 2) if args.quick else (3, 8)
    rows = time_levels(demo.model, demo.data.batch_size, rounds, steps, shape)
    return {"mode": "levels", "cpu": describe_cpu(), "results": rows}


def constant(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure greedy steps of a trained model after contexts of every length."""
    turns, steps = (3, 4) if args.quick else (15, 16)
    contexts, trust = args.contexts or CONTEXTS, trust_of(args)
    measured = time_constant(args.model, contexts, turns, steps, args.dtype, args.engine, trust)
    return {"mode": "constant", "cpu": describe_cpu(), **measured}


def decoding(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure steps or prompts of converted models and of the baselines."""
    contexts = args.contexts or ((128, 2048) if args.quick else CONTEXTS)
    batches = args.batches or ((1, 16) if args.quick else (1, 4, 16, 64, 256))
    effort = QUICK if args.quick else Effort()
    with tempfile.TemporaryDirectory() as folder:
        longest, most = (BATCH_CONTEXT, max(batches)) if args.mode == "batch" else (max(contexts), 1)
        subjects = gather(args, shape, longest, most, Path(folder))
        if args.mode == "prefill":
            found = [dtype for dtype in ("float32", "bfloat16") if capability(f"onednn_{dtype}")]
            subjects += [products(dtype, shape) for dtype in found]
            bandwidth = read_bandwidth()
            rows = with_shares(time_prefill(subjects, contexts, shape.vocab_size, effort))
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
    """Print the CPU, the measured bandwidth or FLOP rate, and the table of results."""
    mode = result["mode"]
    print(result["cpu"])
    if mode == "levels":
        print(f"\n{level_table(result['results'])}")
        return
    if mode == "train":
        print(
            "tokens per second (share of the FLOP rate); FLOP rate of matrix products: "
            f"{result['gemm_flops'] / 1e9:,.0f} GFLOP/s\n\n{table(result)}\n\n{memory_table(result)}"
        )
        return
    if mode == "constant":
        print(constant_table(result))
        return
    what = {
        "decode": "ms per token (share of the bandwidth)",
        "prefill": "tokens per second (share of the matrix products alone)",
    }.get(mode, "tokens per second")
    print(f"{what}; memory read bandwidth: {result['bandwidth_gbs']:.1f} GB/s\n\n{table(result)}")


def gather(
    args: argparse.Namespace, shape: ModelConfig, longest: int, rows: int, folder: Path
) -> list[Subject]:
    """Return the converted models, then the baselines; print a line for each that is not available."""
    cases = [case for case in OURS[args.mode] if case[1] in args.engines]
    if args.quick:
        cases = [case for case in cases if case[1] != "compiled"]
    compiler = capability("cpp_compiler")
    if not compiler and any(case[1] == "compiled" for case in cases):
        show_skipped("compiled engines", f"no C++ compiler ({compiler.reason})")
        cases = [case for case in cases if case[1] != "compiled"]
    subjects = []
    for case in tqdm(cases, desc="converting and compiling", leave=False, disable=None):
        try:
            subjects.append(ours(*case, shape, folder))
        except UserError as error:
            if case[1] != ONNX:
                raise
            show_skipped(ONNX, str(error))
    for kind in args.peers:
        if kind == "mamba" and args.mode == "prefill":
            show_skipped(kind, "prefills token by token without its GPU kernels")
            continue
        try:
            for dtype in peer_dtypes(kind, args.quick):
                if kind == LLAMA_CPP:
                    subjects.append(llama_cpp(dtype, shape, longest, rows, folder))
                else:
                    subjects.append(peer(kind, dtype, shape, longest))
        except UserError as error:
            show_skipped(kind, str(error))
    return subjects


def peer_dtypes(kind: str, quick: bool) -> tuple[str, ...]:
    """Return the weight dtypes in which a baseline is measured."""
    if kind == LLAMA_CPP:
        return ("float32",) if quick else ("float32", "bfloat16", "int8")
    return ("float32",) if kind == "mamba" or quick else ("float32", "bfloat16")


def show_skipped(what: str, why: str) -> None:
    """Print a line about a model that is not measured, on stderr."""
    print(f"skipped: {what}: {why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(main))
