#!/usr/bin/env python
"""Benchmark converted models of 24M weights against Llama, GPT-2 and Mamba of transformers, and llama.cpp.

Modes:
MODES

Cases are interleaved; the tables show medians, ratios to a baseline of the same run, and the measured memory
bandwidth or rate of matrix products as the limit. Models have random weights, because speed does not depend
on them, except those of the modes that take a MODEL. The model tnnlm-default is what a user gets without
options: train.py, then convert.py, then generate.py.

Examples:
  python tools/benchmark.py decode
  python tools/benchmark.py prefill --quick              # shorter prompts, about a minute
  python tools/benchmark.py batch --json batch.json --png batch.png
  python tools/benchmark.py decode --contexts 512 --engines packed eager
  python tools/benchmark.py train
  python tools/benchmark.py constant runs/demo
  python tools/benchmark.py levels
  python tools/benchmark.py serve --llama-server build/bin/llama-server

Needs: `pip install -c constraints.txt -e '.[peers]'`; for llama.cpp also the extra `[llama-cpp]`, for
onnxruntime `[onnx]`, and for serve `[serve]` and aiohttp.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.constant import constant_table, measure_constant
from benchmarks.conversion import measure_conversion, show_conversion
from benchmarks.decoding import ENGINES, LLAMA_CPP, measure_decoding, show_decoding
from benchmarks.levels import level_table, measure_levels
from benchmarks.report import plot
from benchmarks.serving import measure_serving, show_serving
from benchmarks.speculation import measure_speculation, show_speculation
from benchmarks.subjects import PEERS, SHAPE
from benchmarks.train_step import measure_training, training_table
from experiments.commits import provenance
from tnnlm.cli.usage import add_trust
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import check_file, write_text
from tnnlm.inference.engine import ENGINES as LOADED
from tnnlm.inference.linear import DTYPES
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import processor
from tnnlm.machine.threads import limit_threads


class Mode(NamedTuple):
    """Kind of measurement."""

    summary: str
    """Line of ``--help`` that describes the measurement."""
    measure: Callable[[argparse.Namespace, ModelConfig], dict[str, Any]]
    """Return the results as plain data, for ``--json``."""
    show: Callable[[dict[str, Any]], str]
    """Return the results as text."""
    takes_model: bool = False
    """Whether a trained model can be given."""
    plots: bool = True
    """Whether ``--png`` applies."""


MODES = {
    "decode": Mode("milliseconds per token by context length", measure_decoding, show_decoding),
    "prefill": Mode(
        "prompt tokens per second by prompt length, next to the matrix products alone",
        measure_decoding,
        show_decoding,
    ),
    "batch": Mode("generated tokens per second by batch size", measure_decoding, show_decoding),
    "serve": Mode(
        "generated tokens per second by concurrent streams, next to llama.cpp's server",
        measure_serving,
        show_serving,
        takes_model=True,
    ),
    "convert": Mode(
        "seconds of convert.py, of its stages, and of importing torch",
        measure_conversion,
        show_conversion,
        takes_model=True,
        plots=False,
    ),
    "speculate": Mode(
        "tokens per second with and without speculative decoding, of one model",
        measure_speculation,
        show_speculation,
        takes_model=True,
        plots=False,
    ),
    "train": Mode(
        "tokens per second and peak memory of training steps, next to GPT-2 of equal parameters and a TNN "
        "with the operations of tnn-pytorch",
        measure_training,
        training_table,
    ),
    "constant": Mode(
        "time per token and state size of a trained model by context length",
        measure_constant,
        constant_table,
        takes_model=True,
    ),
    "levels": Mode(
        "training and decoding with the native instructions of this CPU, with AVX2 and without AVX",
        measure_levels,
        level_table,
        plots=False,
    ),
}
"""Modes by name."""


def parse() -> argparse.Namespace:
    """Return the checked arguments of the command line."""
    parser = OneLineParser(description=_description(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES, help="Kind of measurement.")
    with_model = ", ".join(name for name, mode in MODES.items() if mode.takes_model)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"Model of {with_model}: folder, run or checkpoint. (default: of "
        "constant and speculate the newest, of others random weights)",
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="Write the results as JSON.")
    add("--record", type=Path, metavar="FILE", help="Write the results as a record of docs/records.")
    add("--machine", metavar="TEXT", help="Machine for --record. (default: threads and processor)")
    add("--png", type=Path, metavar="FILE", help="Plot the results (not of convert, levels and speculate).")
    add = parser.add_argument_group("cases").add_argument
    add("--quick", action="store_true", help="Measure fewer cases and repetitions, nothing compiled.")
    add("--contexts", type=int, nargs="+", metavar="N", help="Lengths in tokens. (default: 128 to 8,192)")
    add("--batches", type=int, nargs="+", metavar="B", help="Batch sizes of batch. (default: 1 to 256)")
    add("--streams", type=int, nargs="+", metavar="N", help="Streams of serve. (default: 1, 8, 64, 200)")
    add("--d-model", type=int, default=SHAPE.d_model, metavar="D", help="Width of the models. (default: 512)")
    _add_models(parser)
    args = parser.parse_args()
    mode = MODES[args.mode]
    if args.model and not mode.takes_model:
        raise UserError(f"{args.model}: a model can only be given in the modes {with_model}")
    if args.png and not mode.plots:
        raise UserError(f"--png: the mode {args.mode} has no plot")
    for number in (*(args.contexts or ()), *(args.batches or ()), *(args.streams or ()), args.d_model):
        if not 1 <= number <= 1 << 20:
            raise UserError(f"{number}: must be from 1 to {1 << 20:,}")
    return args


def _add_models(parser: argparse.ArgumentParser) -> None:
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
    add = parser.add_argument_group("models of constant, convert, serve and speculate").add_argument
    add("--engine", choices=LOADED, default="auto", help="Engine of constant and speculate. (default: auto)")
    add("--dtype", choices=DTYPES, default="float32", help="Dtype of the weights. (default: float32)")
    add(
        "--llama-server", metavar="PATH", help="Program llama-server of serve. (default: the one on the PATH)"
    )
    add(
        "--speculate",
        default="ngram",
        metavar="ngram|MODEL",
        help="Proposals of speculate: by lookup or by a smaller model. (default: ngram)",
    )
    add_trust(add)


def _description() -> str:
    """Return the text of ``--help`` with the list of modes."""
    width = max(map(len, MODES))
    lines = [
        textwrap.fill(
            f"{name:{width}}  {mode.summary}", 110, initial_indent="  ", subsequent_indent=" " * (width + 4)
        )
        for name, mode in MODES.items()
    ]
    return (__doc__ or "").replace("MODES", "\n".join(lines), 1)


def main() -> int:
    """Measure one mode, write the results and print them; return the exit code."""
    args = parse()
    keep_large_blocks()
    limit_threads()
    shape = replace(SHAPE, d_model=args.d_model, glu_dim=args.d_model)
    for path in filter(None, (args.json, args.record, args.png)):
        check_file(path)
    mode = MODES[args.mode]
    result = mode.measure(args, shape)
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    if args.record:
        write_text(args.record, json.dumps(record_of(result, args.machine), indent=1) + "\n")
    if args.png:
        plot(result, args.png)
    print(f"{result['cpu']}\n{mode.show(result)}")
    return 0


def record_of(result: dict[str, Any], machine: str | None) -> dict[str, Any]:
    """Return the record of a result, whose single numbers pages can quote."""
    words = sys.argv[1:]
    for option in ("--record", "--machine", "--json", "--png"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    own = f"{limit_threads().threads} threads of an {processor()}"
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    command = shlex.join(["python", "tools/benchmark.py", *words])
    return provenance(command, machine or own) | {"values": numbers, "result": result}


if __name__ == "__main__":
    sys.exit(run_script(main))
