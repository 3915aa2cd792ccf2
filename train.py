#!/usr/bin/env python
"""Train a language model with FFT convolutions, and turn its checkpoints into recurrences.

Examples:
  python train.py                                                # the demo, on Python's own sources
  python train.py data.source=files data.files=book.txt name=book
  python train.py --config configs/tnn_wt103.yaml --dry-run
  python train.py --resume                                       # the newest run; or --resume NAME
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tnnlm.config import Config
from tnnlm.config_io import config_to_yaml, load_config
from tnnlm.errors import run_script

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (default: configs/demo.yaml)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run by name or folder (default: the newest)",
    )
    parser.add_argument(
        "--find-lr", action="store_true", help="try 100 rising learning rates, suggest one, train nothing"
    )
    parser.add_argument("--dry-run", action="store_true", help="show settings and sizes, train nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of the file")
    return parser.parse_intermixed_args()


def main() -> int:
    args = parse()
    run = None
    if args.resume is None:
        config = load_config(args.config or DEMO, args.overrides)
    else:
        from tnnlm.runs import find_run
        from tnnlm.training.run import resumed_config

        # "--resume key=value" means the newest run: a run's name has no "=".
        if "=" in args.resume:
            args.overrides.insert(0, args.resume)
            args.resume = ""
        run = find_run(args.resume or None, Path("runs"))
        config = resumed_config(run, args.overrides)
    if args.dry_run:
        show(config, args.json)
        return 0
    if args.find_lr:
        search(config)
        return 0
    from tnnlm.training.checkpointing import TrainingStopped
    from tnnlm.training.run import train

    try:
        train(config, run)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    return 0


def search(config: Config) -> None:
    from tnnlm.training.find_lr import find_lr, plot_rates

    found = find_lr(config)
    path = Path(config.runs_dir) / f"{config.name}-lr_find.png"
    plot_rates(found, path)
    print(f"suggested: optim.lr={found.suggestion:.1e}")
    print(f"the loss falls fastest at {found.steepest:.1e}, and is lowest at {found.lowest:.1e}")
    print(f"drawn in {path}; a rate found in 100 steps is a start, not an optimum")


def show(config: Config, as_json: bool) -> None:
    from tnnlm.training.plan import make_plan

    plan = make_plan(config)
    if as_json:
        print(json.dumps(plan.to_dict(config), indent=2))
        return
    print(config_to_yaml(config))
    print(f"params: {plan.params:,} trainable, {plan.buffers:,} frozen")
    print(f"tokens per update: {plan.tokens_per_update:,} ({plan.total_tokens:,} in all)")
    print(
        f"estimated memory: {plan.memory_bytes / 2**30:.2f} GiB per device ({plan.devices}), {plan.precision}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
