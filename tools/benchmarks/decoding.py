"""Modes decode, prefill and batch: converted models and baselines of equal weight bytes, interleaved."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.constant import CONTEXTS
from benchmarks.installed import DEFAULT, default_subject, install
from benchmarks.limits import limits_table, product_seconds
from benchmarks.llama_cpp import llama_cpp
from benchmarks.prefill import products, with_shares
from benchmarks.ratios import ratio_table
from benchmarks.report import table
from benchmarks.subjects import ours, peer
from experiments.timing import QUICK, Effort, Subject, read_bandwidth, time_prefill, time_steps
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError
from tnnlm.machine.capabilities import capability, describe_cpu

LLAMA_CPP = "llama.cpp"
ONNX = "onnxruntime"
ENGINES = (DEFAULT, "compiled", "packed", "eager", ONNX)
BATCH_CONTEXT = 128
OURS = {
    "decode": [
        (DEFAULT, DEFAULT, "float32"),
        *(("balanced", engine, "float32") for engine in ENGINES if engine != DEFAULT),
        *(("balanced", engine, dtype) for engine in ("compiled", "packed") for dtype in ("bfloat16", "int8")),
        *((conversion, "packed", "float32") for conversion in ("etsc512", "window512")),
    ],
    "prefill": [
        (DEFAULT, DEFAULT, "float32"),
        *(("balanced", "packed", dtype) for dtype in ("float32", "bfloat16", "int8")),
    ],
    "batch": [
        (DEFAULT, DEFAULT, "float32"),
        *(
            ("balanced", engine, dtype)
            for engine in ("compiled", "packed")
            for dtype in ("float32", "bfloat16", "int8")
        ),
        *((conversion, "packed", "float32") for conversion in ("etsc512", "window512")),
    ],
}
"""Models of tnnlm by mode: conversion, engine and dtype."""


def measure_decoding(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
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
    result = {"mode": args.mode, "cpu": describe_cpu(), "bandwidth_gbs": bandwidth, "results": rows}
    if args.mode == "batch":
        dtypes = dict.fromkeys(row["dtype"] for row in rows if row["name"].startswith("tnnlm"))
        result["limits"] = [
            {"dtype": dtype, "rows": n, "tokens_per_second": n / seconds}
            for dtype in dtypes
            for n, seconds in product_seconds(shape, dtype, batches).items()
        ]
    return result


def show_decoding(result: dict[str, Any]) -> str:
    """Return the bandwidth, the table of results, ratios, and the rates of the matrix products alone."""
    mode = result["mode"]
    what = {
        "decode": "ms per token (share of the bandwidth)",
        "prefill": "tokens per second (share of the matrix products alone)",
    }.get(mode, "tokens per second")
    text = f"{what}; memory read bandwidth: {result['bandwidth_gbs']:.1f} GB/s\n\n{table(result)}"
    if ratios := ratio_table(result):
        text += f"\n\n{ratios}"
    if "limits" in result:
        text += f"\n\n{limits_table(result['limits'], 'batch')}"
    return text


def gather(
    args: argparse.Namespace, shape: ModelConfig, longest: int, rows: int, folder: Path
) -> list[Subject]:
    """Return the converted models, then the baselines; print a line for each that is not available."""
    cases = [case for case in OURS[args.mode] if case[1] in args.engines]
    if args.quick:
        cases = [case for case in cases if case[1] not in (DEFAULT, "compiled")]
    compiler = capability("cpp_compiler")
    if not compiler and any(case[1] == "compiled" for case in cases):
        show_skipped("compiled engines", f"no C++ compiler ({compiler.reason})")
        cases = [case for case in cases if case[1] != "compiled"]
    subjects = []
    for case in tqdm(cases, desc="converting and compiling", leave=False, disable=None):
        try:
            if case[1] == DEFAULT:
                subject, engine = default_subject(install(shape, folder))
                print(f"{subject.name}: {engine}", file=sys.stderr)
                subjects.append(subject)
            else:
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
