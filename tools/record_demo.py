#!/usr/bin/env python
"""Record what the demo measured and printed, for README and docs: docs/records/demo.json and three figures.

The log is what ``make demo`` printed; ``tools/render_docs.py`` renders the pages afterwards.

Examples:
  python tools/record_demo.py runs/demo --log demo.log --machine "two cores of an AMD EPYC"
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from documentation.drawings import draw_etsc, draw_reduction, draw_taps
from documentation.records import RECORDS, ROOT
from experiments.commits import current_commit
from tnnlm.checkpoints.locate import load_trained
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import write_text
from tnnlm.machine.capabilities import cpu_level, processor
from tnnlm.models.surgery import kernels

PROMPT = "def "
_SHOWN = ("data: ", "train: ", "runs/", "step ")
"""Beginnings of the lines of train.py that are recorded: data, sizes and progress."""
SAMPLE_LINES = 16
"""Lines of the generated sample that are recorded."""


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a complete demo run.")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help="Output of make demo.")
    parser.add_argument(
        "--machine", metavar="TEXT", help="Name of the machine (default: the processor's name)."
    )
    return parser.parse_args()


def main() -> int:
    """Run the command, and return its exit code."""
    args = parse()
    summary = args.run / "summary.json"
    if not summary.is_file() or not args.log.is_file():
        raise UserError(f"{args.run}, {args.log}: no complete run and its log", "run make demo first")
    texts = texts_of(args.log.read_text(encoding="utf-8"))
    measured = json.loads(command("generate.py", "--model", str(args.run), "--prompt", PROMPT, "--json"))
    trained = load_trained(args.run)
    layers = kernels(trained.model)
    report = json.loads((args.run / "converted/conversion.json").read_text(encoding="utf-8"))
    figures = ROOT / "docs/explanation"
    draw_taps(layers, figures / "taps.png")
    draw_etsc(layers[0], trained.config.model.max_length, figures / "etsc.png")
    reduced = draw_reduction(layers, report["horizon"], figures / "reduction.png")
    record = {
        "command": "make demo",
        "machine": args.machine or processor(),
        "cpu_level": cpu_level(),
        "torch": torch.__version__.partition("+")[0],
        "date": date.today().isoformat(),
        "commit": current_commit(),
        "values": values_of(json.loads(summary.read_text(encoding="utf-8")), report, measured),
        "tables": {"reduction": reduction_table(reduced)},
        "texts": texts,
    }
    write_text(RECORDS / "demo.json", json.dumps(record, indent=1) + "\n")
    return 0


def texts_of(log: str) -> dict[str, str]:
    """Return what each command of ``make demo`` printed; long output is shortened.

    Raises:
        UserError: If a command is missing from the log.
    """
    parts = re.split(r"^\S*python (train|convert|generate)\.py.*\n", log, flags=re.MULTILINE)
    printed = dict(zip(parts[1::2], parts[2::2], strict=True))
    if printed.keys() != {"train", "convert", "generate"}:
        raise UserError("--log: is not the output of a complete make demo", "run make demo again")
    lines = [line for line in printed["train"].splitlines() if line.startswith(_SHOWN)]
    first = next(index for index, line in enumerate(lines) if line.startswith("step "))
    return {
        "train": "\n".join([*lines[: first + 1], "...", *lines[-2:]]),
        "convert": printed["convert"],
        "generate": "\n".join(printed["generate"].splitlines()[:SAMPLE_LINES]),
    }


def values_of(summary: dict[str, Any], report: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that pages show, by name."""
    numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
    found: dict[str, Any] = {key.removeprefix("val/"): value for key, value in numbers.items()}
    found |= {key: report[key] for key in ("horizon", "state_bytes", "etsc_state_bytes", "kv_cache_bytes")}
    found["minutes"] = summary["train_seconds"] / 60
    found["million_tokens"] = summary["tokens_seen"] / 1e6
    found["state_kib"], found["kv_cache_kib"] = report["state_bytes"] / 1024, report["kv_cache_bytes"] / 1024
    found["orders"] = ", ".join(str(layer["order"]) for layer in report["layers"])
    found["largest_tap_error"] = max(layer["relative_tap_error"] for layer in report["layers"])
    found["converted_ppl"] = report["ppl"]
    found["ms_per_token"] = 1e3 * measured["seconds_per_token"]
    return found


def reduction_table(reduced: dict[str, list[dict[str, float]]]) -> list[dict[str, str]]:
    """Return the rows of every layer as cells."""
    return [
        {
            "layer": layer.removeprefix("layer "),
            "order": f"{row['order']:.0f}",
            "lower bound": f"{row['bound']:.1e}",
            "Hankel-norm error": f"{row['hankel_error']:.1e}" if "hankel_error" in row else "-",
            "Hankel ratio": f"{row['hankel_error'] / row['bound']:.2f}" if "hankel_error" in row else "-",
            "tap error": f"{row['tap_error']:.1e}",
        }
        for layer, rows in reduced.items()
        for row in rows
    ]


def command(*words: str) -> str:
    """Run a script of this checkout and return what it prints.

    Raises:
        UserError: If it fails.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]], capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(run_script(main))
