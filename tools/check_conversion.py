#!/usr/bin/env python
"""Check what the certificates of conversions state against an independent dense computation.

Every run is converted in memory; nothing is written to its folder. For each layer the recurrence is stepped
in float64 on an impulse, and its outputs are compared with the taps of the kernel over 8 horizons and 8
training lengths. The relative tap error, the relative l1 error and the largest pole that the certificate
states must not be below the ones found so. The perplexities of both forms are then compared at 1, 2 and 8
training lengths. Exit code 0 if everything holds, 1 otherwise.

Examples:
  python tools/check_conversion.py runs/demo
  python tools/check_conversion.py runs/demo runs/rtf_demo --method auto --tolerance 1e-3 --json checks.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from tnnlm.checkpoints.certificate import ConversionReport
from tnnlm.checkpoints.locate import find_checkpoint
from tnnlm.checkpoints.training import TrainedCheckpoint, load_checkpoint
from tnnlm.cli.usage import add_trust, trust_of
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, measure
from tnnlm.data.mixture import open_corpus
from tnnlm.errors import OneLineParser, run_script
from tnnlm.evaluation import add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.files import check_file, write_text
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams
from tnnlm.trust import NO_CODE, Trust

EXTENT = 8
"""Number of horizons and of training lengths over which outputs are compared."""
LENGTHS = (1, 2, 8)
"""Multiples of the training length at which perplexities are compared."""
TOKENS = 1 << 14
"""Number of validation tokens for each length, at least one row."""
LARGEST_GAP = 1e-4
"""Largest relative difference of the perplexities of both forms that passes."""
SLACK = 1e-6
"""Rounding, relative to the kernel, by which a stated error may be below the measured one."""


@dataclass(frozen=True)
class Figures:
    """Errors of one recurrence, as the certificate states them or as the impulse response has them."""

    relative_tap_error: float
    l1_error: float
    largest_pole: float

    def below(self, measured: Figures) -> list[str]:
        """Return the names of the figures that are below the measured ones by more than rounding."""
        return [
            name
            for name, value in asdict(self).items()
            if not value >= getattr(measured, name) * (1 - SLACK) - SLACK
        ]


def main() -> int:
    """Check all runs and print a table; return 0 if everything holds."""
    args = parse()
    if args.json is not None:
        check_file(args.json)
    recipe = ConversionConfig(method=args.method, tolerance=args.tolerance)
    results = [check_run(find_checkpoint(run, Path("runs")), recipe, trust_of(args)) for run in args.runs]
    if args.json is not None:
        write_text(args.json, json.dumps(results, indent=2) + "\n")
    show(results)
    return 0 if all(result["holds"] for result in results) else 1


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN | CKPT", help="Runs or checkpoints to convert and to check.")
    add("--method", default="auto", help="Conversion method. (default: auto)")
    add("--tolerance", type=float, default=1e-3, help="Maximum relative tap error. (default: 0.001)")
    add("--json", type=Path, metavar="FILE", help="Write all figures as JSON.")
    add_trust(add, compiled=False)
    return parser.parse_args()


def check_run(checkpoint: Path, recipe: ConversionConfig, trust: Trust = NO_CODE) -> dict[str, Any]:
    """Convert one run and return the figures of its layers and perplexities, as plain data.

    Args:
        checkpoint: Checkpoint of a causal language model.
        recipe: Method and tolerance of the conversion.
        trust: Whether the kernel module of the checkpoint may run.
    """
    source = load_checkpoint(checkpoint, trust)
    model, length = source.model.eval(), source.config.model.max_length
    horizon, layers = convert_layers(model, recipe)
    report = measure(model, layers, method=recipe.method, horizon=horizon, seconds=0.0)
    rows = []
    for kernel, layer, stated in tqdm(
        list(zip(kernels(model), layers, report.layers, strict=True)),
        desc="impulse responses",
        leave=False,
        disable=None,
    ):
        with torch.no_grad():
            k = kernel(EXTENT * max(horizon, length)).double()
        found = measured_figures(k, layer.params, horizon)
        said = stated_figures(stated)
        rows.append(
            {
                "method": stated.method,
                "reason": stated.reason,
                "stated": asdict(said),
                "measured": asdict(found),
                "below": said.below(found),
            }
        )
    converted = attach(model, [layer.params for layer in layers])
    gaps = {str(size): gap for size, gap in _gaps(source, converted)}
    holds = all(not row["below"] for row in rows) and all(abs(gap) <= LARGEST_GAP for gap in gaps.values())
    return {
        "checkpoint": str(checkpoint),
        "kernel": source.config.model.kernel.name,
        "horizon": horizon,
        "layers": rows,
        "ppl_gap": gaps,
        "holds": holds,
    }


def stated_figures(report: ConversionReport) -> Figures:
    """Return what a certificate states."""
    return Figures(report.relative_tap_error, report.l1_error, report.largest_pole)


@torch.no_grad()
def measured_figures(k: Tensor, params: Params, horizon: int) -> Figures:
    """Return the errors of a recurrence, found by stepping it on an impulse in float64.

    Args:
        k: Taps of the kernel (E, T), float64.
        params: Recurrence to step.
        horizon: Number of lags over which the relative error is measured; l1 takes all T lags.
    """
    response = impulse_response(params, k.shape[1])
    difference = response - k
    norm = k[:, :horizon].norm().clamp(min=torch.finfo(torch.float64).tiny)
    l1 = difference.abs().sum(1) / k.abs().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    return Figures(float(difference[:, :horizon].norm() / norm), float(l1.max()), _largest_pole(params))


def impulse_response(params: Params, length: int) -> Tensor:
    """Return the first ``length`` outputs (E, ``length``) for the input 1, 0, 0, ..., in float64."""
    params = params.to_dtype(torch.float64)
    state = params.init_state(1)
    channels = len(params.channels_of(slice(None)).taps(1))
    x = torch.ones(1, channels, dtype=torch.float64)
    outputs = []
    for _ in range(length):
        y, state = params.step(x, state)
        outputs.append(y[0])
        x = torch.zeros_like(x)
    return torch.stack(outputs, dim=1)


def _largest_pole(params: Params) -> float:
    if isinstance(params, CompanionParams):
        n = params.order()
        matrix = torch.diag_embed(
            params.denominator.new_ones(len(params.denominator), n - 1), offset=-1
        ).double()
        matrix[:, 0] = -params.denominator
        return float(torch.linalg.eigvals(matrix).abs().max())
    if isinstance(params, SSMParams) and params.poles.numel():
        real, imag = params.poles.double().unbind(-2)
        return float(torch.hypot(real, imag).max())
    return 0.0


def _gaps(source: TrainedCheckpoint, converted: CausalLM) -> Iterator[tuple[int, float]]:
    """Yield each length in tokens with the relative difference of the perplexities of both forms."""
    config = source.config
    corpus = open_corpus(config.data, config.model.vocab_size, config.seed)
    for multiple in LENGTHS:
        length = multiple * config.model.max_length
        rows = corpus.rows("val", length)
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), max(1, TOKENS // length))).round().long()
        parallel, recurrent = [], []
        for index in tqdm(chosen.tolist(), desc=f"perplexity at {length}", leave=False, disable=None):
            tokens = rows[index][None]
            parallel.append(parallel_nll(source.model, tokens))
            recurrent.append(recurrent_nll(converted, tokens, config.conversion.chunk))
        yield length, ppl_gap(add(parallel).ppl, add(recurrent).ppl)


def show(results: list[dict[str, Any]]) -> None:
    """Print a table of all layers, the perplexities, and what does not hold."""
    table = Table(title="stated by the certificate / measured by stepping")
    for name in ("run", "layer", "method", "relative tap error", "relative l1 error", "largest pole"):
        table.add_column(name, justify="right" if name not in ("run", "method") else "left")
    for result in results:
        for index, row in enumerate(result["layers"]):
            cells = [
                f"{row['stated'][name]:{form}} / {row['measured'][name]:{form}}"
                for name, form in (
                    ("relative_tap_error", ".2e"),
                    ("l1_error", ".2e"),
                    ("largest_pole", ".6f"),
                )
            ]
            table.add_row(result["kernel"], str(index), row["method"], *cells)
    Console().print(table)
    for result in results:
        gaps = ", ".join(f"{gap:+.1e} at {length} tokens" for length, gap in result["ppl_gap"].items())
        print(f"{result['checkpoint']}: perplexity gap {gaps}")
        for index, row in enumerate(result["layers"]):
            for name in row["below"]:
                print(f"{result['checkpoint']}: layer {index}: the stated {name} is below the measured one")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
