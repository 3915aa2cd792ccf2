#!/usr/bin/env python
"""Compare the conversions: error and seconds against size, perplexity against context, error against order.

Writes conversions.json, conversions.md and a picture of each part.

Examples:
  python tools/compare_conversions.py                              # the newest run; minutes
  python tools/compare_conversions.py runs/demo --quick            # smaller sizes
  python tools/compare_conversions.py runs/demo --parts order --out docs/conversions
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from experiments.comparison import QUICK, Sizes, kernel_taps, random_taps, scaling
from experiments.comparison_models import orders, perplexity
from experiments.comparison_plots import plot, tables
from tnnlm.checkpoints.locate import find_checkpoint
from tnnlm.checkpoints.training import TrainedCheckpoint, load_checkpoint
from tnnlm.data.packing import prepare
from tnnlm.errors import CheckpointError, DataError, UserError, run_script
from tnnlm.files import write_text
from tnnlm.machine.capabilities import describe_cpu

PARTS = ("scaling", "perplexity", "order")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN | CKPT",
        help="run folder or name, or a checkpoint (default: newest)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument(
        "--out", type=Path, default=Path("conversions"), metavar="DIR", help="default: conversions/"
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is not a folder; give another --out")
    source = find_source(args.target, args.parts)
    args.out.mkdir(parents=True, exist_ok=True)
    result = compare(source, args.parts, QUICK if args.quick else Sizes())
    write_text(args.out / "conversions.json", json.dumps(result, indent=2) + "\n")
    text = tables(result)
    write_text(args.out / "conversions.md", text)
    plot(result, args.out)
    print(text)
    print(f"wrote {args.out}/")
    return 0


def find_source(target: str | None, parts: list[str]) -> TrainedCheckpoint | None:
    """The checkpoint; None, for random taps, if none was asked for, none is there and none is needed."""
    try:
        return load_checkpoint(find_checkpoint(target, Path("runs")))
    except CheckpointError:
        if target is not None or set(parts) != {"scaling"}:
            raise
        return None


def compare(source: TrainedCheckpoint | None, parts: list[str], sizes: Sizes) -> dict[str, Any]:
    """The parts asked for; perplexities only if the run's text is still there."""
    result: dict[str, Any] = {
        "source": "random taps, decay 0.99" if source is None else f"{source.path}, step {source.step}",
        "about": f"{describe_cpu()}.",
        "notes": [],
    }
    if "scaling" in parts:
        result["scaling"] = scaling(
            partial(random_taps, sizes.channels) if source is None else partial(kernel_taps, source.model),
            sizes,
        )
    if "perplexity" in parts and source is not None:
        try:
            corpus = prepare(source.config.data, source.config.model.vocab_size, source.config.seed)
            if corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
                raise DataError("the text of this run has changed")
            result["perplexity"] = perplexity(source.model, partial(corpus.rows, "val"), sizes)
        except DataError as error:
            result["notes"].append(f"no perplexities: {error}")
    if "order" in parts and source is not None:
        result["order"] = orders(source.model, sizes)
    return result


if __name__ == "__main__":
    sys.exit(run_script(main))
