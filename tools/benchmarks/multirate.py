"""Benchmark of SGConv's two exact recurrences: multirate steps against a window of all inputs.

``multirate`` distributes part of its work over the tokens of a turn, so its time is the mean over whole
turns, and the median and the longest step are given too. All times are CPU times of one thread, for one row
and random weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.subjects import SHAPE
from experiments.commits import provenance
from tnnlm.checkpoints.converted import ConvertedModel, model_fingerprint
from tnnlm.conversion import convert_model
from tnnlm.files import write_text
from tnnlm.inference.aot import compile_step
from tnnlm.inference.engine import open_engine
from tnnlm.kernels import SGConvConfig, SGConvKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import recurrences
from tnnlm.ops.multirate import MultirateParams
from tnnlm.tokenizer import train_bpe

LENGTHS = (512, 2048, 8192)
METHODS = ("window", "multirate")
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs/records/multirate.json"
Step = Callable[[], object]
Row = dict[str, str]


def seconds(steps: dict[str, Step], turn: int, rounds: int) -> dict[str, list[list[float]]]:
    """Return the CPU seconds of every step by name, in rounds: a turn of ``multirate``, and 4 others."""
    took: dict[str, list[list[float]]] = {name: [] for name in steps}
    for measured in range(rounds + 1):
        for name, step in steps.items():
            part = [cpu_seconds(step) for _ in range(turn if name == "multirate" else 4)]
            if measured:  # the first round is a warm-up
                took[name].append(part)
    return took


def cpu_seconds(step: Step) -> float:
    """Return the CPU seconds of a call, which other processes on the machine hardly affect."""
    started = time.process_time()
    step()
    return time.process_time() - started


def decoder(step: Callable[[Any, Any], tuple[Any, Any]], x: torch.Tensor, state: Any) -> Step:
    """Return a call that processes ``x`` as the next token."""
    states = [state]

    def run() -> None:
        _, states[0] = step(x, states[0])

    return run


def row(form: str, length: int, steps: dict[str, Step], turn: int, rounds: int) -> Row:
    """Measure both methods, and return a row of the table of times."""
    took = seconds(steps, turn, rounds)
    mean = {name: 1e3 * median(sum(part) / len(part) for part in parts) for name, parts in took.items()}
    return {
        "lags": f"{length:,}",
        "measured": form,
        "window, ms per token": f"{mean['window']:.2f}",
        "multirate, ms per token": f"{mean['multirate']:.2f}",
        "times as fast": f"{mean['window'] / mean['multirate']:.1f}",
        "median step, ms": f"{1e3 * median(median(part) for part in took['multirate']):.2f}",
        "longest step, ms": f"{1e3 * median(max(part) for part in took['multirate']):.2f}",
    }


def measure(length: int, engines: tuple[str, ...], rounds: int) -> tuple[Row, list[Row]]:
    """Return the row of costs of a kernel length, and the rows of times."""
    torch.manual_seed(0)
    kernel = SGConvConfig(name="sgconv", kernel_dim=16)
    model = CausalLM(replace(SHAPE, n_layers=1, max_length=length, kernel=kernel)).eval()
    models = {name: convert_model(model, method=name, horizon=length) for name in METHODS}
    window, multirate = (recurrences(models[name])[0] for name in METHODS)
    assert isinstance(multirate, MultirateParams)
    turn, channels = multirate.init_state(1).ahead.shape[1:]
    cost = {
        "lags": f"{length:,}",
        "multiply-adds, window": f"{window.multiply_adds() // channels:,}",
        "multiply-adds, multirate": f"{multirate.multiply_adds() // channels:,}",
        "state relative to the window": f"{multirate.order() / (window.order() - 1):.2f}",
        "tokens per turn": f"{turn:,}",
    }
    x, token = torch.randn(1, channels), torch.tensor([1])
    steps = {
        name: decoder(params.step, x, params.init_state(1))
        for name, params in zip(METHODS, (window, multirate), strict=True)
    }
    rows = [row("one convolution", length, steps, turn, rounds)]
    for engine in engines:
        with tempfile.TemporaryDirectory() as folder:
            for name, converted in models.items():
                fingerprint, tokenizer = (
                    model_fingerprint(converted),
                    train_bpe([" "], 257, "<eos>", 1, False),
                )
                if engine == "compiled":
                    compile_step(copy.deepcopy(converted), Path(folder) / name, "float32", fingerprint)
                whole = ConvertedModel(copy.deepcopy(converted), tokenizer, fingerprint)
                runs = open_engine(whole, Path(folder) / name, engine=engine).generator.model
                steps[name] = decoder(runs.step, token, runs.init_state(1))
            rows.append(row(f"one layer, {engine} engine", length, steps, turn, rounds))
    return cost, rows


def singular_values() -> list[Row]:
    """Return the Hankel singular values of a kernel with random values, the mean over 8 channels."""
    torch.manual_seed(0)
    length = LENGTHS[0]
    k = SGConvKernel(SGConvConfig(name="sgconv", kernel_dim=16), 8, length).double()(length)
    lags = torch.arange(length)
    # Taps past the end are zero.
    hankel = torch.nn.functional.pad(k, (0, length))[:, lags[:, None] + lags]
    sigma = torch.linalg.svdvals(hankel)
    share = (sigma / sigma[:, :1]).mean(0)
    return [
        {"number": f"{n:,}", "relative to the largest": f"{share[n - 1]:.1e}"}
        for n in (1, 16, 32, 64, 128, 256, 384, 512)
    ]


def main() -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Measure three rounds, and no compiled engine.")
    parser.add_argument("--machine", default="an unnamed machine", help="Description of the machine.")
    parser.add_argument("--out", type=Path, default=OUT, help="Record to write.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    engines = ("eager",) if args.quick else ("eager", "compiled")
    with torch.inference_mode():
        measured = [measure(length, engines, 3 if args.quick else 9) for length in LENGTHS]
    command = "python -m benchmarks.multirate" + (" --quick" if args.quick else "")
    record = provenance(command, args.machine) | {
        "tables": {
            "costs": [cost for cost, _ in measured],
            "times": [line for _, lines in measured for line in lines],
            "hankel": singular_values(),
        },
    }
    write_text(args.out, json.dumps(record, indent=1) + "\n")
    print(args.out.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
