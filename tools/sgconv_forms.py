#!/usr/bin/env python
"""What serves an SGConv kernel best: state per channel against error, for every form that could hold it.

Examples:
  python tools/sgconv_forms.py runs/sgconv_demo
  python tools/sgconv_forms.py runs/sgconv_demo --tokens 32768 --out docs/sgconv_forms.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from experiments.finite_forms import finite_forms
from tnnlm.checkpoints.locate import find_checkpoint
from tnnlm.checkpoints.training import load_checkpoint
from tnnlm.data.packing import prepare
from tnnlm.errors import UserError, run_script
from tnnlm.files import write_text
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.threads import limit_threads


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", metavar="RUN | CKPT", help="default: newest run")
    parser.add_argument(
        "--tokens",
        type=int,
        default=1 << 13,
        metavar="N",
        help="held-out tokens per length (default: 8,192)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers here, as JSON")
    args = parser.parse_args()
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be at least 1")
    return args


def main() -> int:
    args = parse()
    keep_large_blocks()
    limit_threads()
    source = load_checkpoint(find_checkpoint(args.target, Path("runs")))
    config = source.config
    if config.model.kernel.name != "sgconv":
        raise UserError(f"{source.path}: its kernel is {config.model.kernel.name}, not sgconv")
    corpus = prepare(config.data, config.model.vocab_size, config.seed)
    rows = {}
    for length in (config.model.max_length, 8 * config.model.max_length):
        every = corpus.rows("val", length, config.data.max_val_tokens)
        chosen = torch.linspace(0, len(every) - 1, min(len(every), max(1, args.tokens // length)))
        if len(every):
            rows[length] = torch.stack([every[int(index)] for index in chosen.round().long()])
    found = finite_forms(source.model, rows)
    if args.out:
        write_text(args.out, json.dumps(found, indent=2) + "\n")
    titles = (
        "form",
        "numbers per channel",
        "tap error",
        "bound",
        *(f"gap, {n}" for n in rows),
    )
    print("| " + " | ".join(titles) + " |\n|---" + "|---:" * (len(titles) - 1) + "|")
    for row in found:
        cells = ["-" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "bound")]
        cells += [f"{row['gap'][n]:+.1e}" if n in row["gap"] else "-" for n in rows]
        print(f"| {row['form']} | {row['order']} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
