#!/usr/bin/env python
"""Compare families of language models: same parameters, tokens, tokenizer, schedule and seeds.

Trains every family on every seed and writes families.json, families.md and families.png: bits per byte,
training speed, perplexity of both forms up to 8 training lengths, seconds and bytes of a decoded token.
Each finished part is saved: the same command goes on where it was stopped.

Examples:
  python tools/compare_models.py --quick                             # minutes
  python tools/compare_models.py                                     # all four, three seeds: over an hour
  python tools/compare_models.py --text wiki.txt --out families-wiki trainer.max_steps=2000
  python tools/compare_models.py --families tnn mine=my_kernel.yaml --seeds 0 1 --lr mine=2e-3
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from experiments.family_measure import Sizes
from experiments.family_report import plot, tables
from experiments.family_run import compare_families
from experiments.sizing import TRANSFORMER, TRANSFORMER_LR, load_families
from tnnlm.errors import UserError, run_script
from tnnlm.files import write_text

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "demo.yaml"
FAMILIES: dict[str, Path | None] = {
    "tnn": DEMO,
    "sgconv": CONFIGS / "sgconv_demo.yaml",
    "rtf": CONFIGS / "rtf_demo.yaml",
    TRANSFORMER: None,
}
SETTING = re.compile(r"\w+(\.\w+)+=")
QUICK = ("model.d_model=128", "model.n_layers=2", "trainer.max_steps=60", "optim.warmup_steps=10")
QUICK_SIZES = Sizes(val_tokens=1 << 13, tokens=1 << 14)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--families", nargs="+", default=list(FAMILIES), metavar="NAME[=FILE]",
        help=f"default: {' '.join(FAMILIES)}; FILE gives the kernel, optim.kernel_lr_scale and conversion",
    )  # fmt: skip
    add("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2; with --quick: 0")
    add("--text", nargs="+", metavar="FILE", help="train on these files (default: configs/demo.yaml's text)")
    add("--lr", action="append", default=[], metavar="NAME=X", help="peak learning rate of one family")
    add("--transformer-lr", default=TRANSFORMER_LR, metavar="X", help="default: %(default)g")
    add("--out", type=Path, metavar="DIR", help="default: families/; with --quick: families-quick/")
    add("--quick", action="store_true", help="a smaller model, 60 steps, one seed")
    add("overrides", nargs="*", metavar="key=value", help="settings over configs/demo.yaml, for all families")
    args = parser.parse_intermixed_args()
    for option in ("families", "text"):  # they also take the settings that follow them
        words = getattr(args, option) or ()
        args.overrides += [word for word in words if SETTING.match(word)]
        setattr(args, option, [word for word in words if not SETTING.match(word)])
        if words and not getattr(args, option):
            parser.error(f"argument --{option}: expected at least one")
    return args


def main() -> int:
    args = parse()
    files = dict(named_file(word) for word in args.families)
    seeds = list(dict.fromkeys(args.seeds or ([0] if args.quick else [0, 1, 2])))
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError("--seeds: must be from 0 to 2^32 - 1")
    lrs = dict(named_rate(word, files) for word in [f"{TRANSFORMER}={args.transformer_lr}", *args.lr])
    words = [*(QUICK if args.quick else ()), *args.overrides]
    if args.text:
        words += ["data.source=files", f"data.files={json.dumps(args.text)}"]
    base, families, left_out = load_families(files, DEMO, words, lrs)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    out = args.out or Path("families-quick" if args.quick else "families")
    sizes = QUICK_SIZES if args.quick else Sizes()
    result = compare_families(base, families, left_out, seeds, sizes, out)
    write_text(out / "families.json", json.dumps(result, indent=2) + "\n")
    text = tables(result)
    write_text(out / "families.md", text)
    plot(result, out / "families.png")
    print(text)
    print(f"wrote {out}/")
    return 0


def named_file(word: str) -> tuple[str, Path | None]:
    """A family's name and where its kernel is read."""
    name, given, file = word.partition("=")
    if not re.fullmatch(r"\w[\w-]*", name) or (given and name == TRANSFORMER):
        raise UserError(f"--families {word}: expected NAME or NAME=FILE, and no file for {TRANSFORMER}")
    if not given and name not in FAMILIES:
        raise UserError(
            f"--families {name}: there is {', '.join(FAMILIES)}; {name}=FILE names another one's settings"
        )
    return name, Path(file) if given else FAMILIES[name]


def named_rate(word: str, files: dict[str, Path | None]) -> tuple[str, float]:
    """A family's name and its peak learning rate."""
    name, _, value = word.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 100 or (name not in files and name != TRANSFORMER):
        raise UserError(f"--lr {word}: expected NAME=X, one of {', '.join(files)} and a number from 0 to 100")
    return name, rate


if __name__ == "__main__":
    sys.exit(run_script(main))
