#!/usr/bin/env python
"""Turn a trained checkpoint into a recurrence: in closed form, without training and without data.

Examples:
  python convert.py                          # the newest run's best checkpoint -> RUN/converted/
  python convert.py runs/demo --verify       # and compare with the slow references; exit 1 if off
  python convert.py runs/demo --method window --out runs/demo/window
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tnnlm.conversion import METHODS
from tnnlm.errors import UserError, run_script


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN | CKPT",
        help="run folder or name, or a checkpoint (default: newest run)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/converted")
    parser.add_argument(
        "--method", choices=METHODS, default="etsc", help="default: etsc; window is the exact baseline"
    )
    parser.add_argument(
        "--horizon",
        default="auto",
        metavar="N|auto",
        help="lags that must be right; auto (default): until the kernel's rest is float32 rounding",
    )
    parser.add_argument("--verify", action="store_true", help="compare with slow references; exit 1 if off")
    parser.add_argument("--force", action="store_true", help="replace a converted model at --out")
    args = parser.parse_args()
    if args.horizon != "auto":
        if not args.horizon.isdecimal() or not 1 <= int(args.horizon) <= 1 << 20:
            raise UserError(
                f"--horizon {args.horizon}: expected auto or a number of lags from 1 to {1 << 20:,}"
            )
        args.horizon = int(args.horizon)
    return args


def main() -> int:
    args = parse()
    from tnnlm.deployment import convert_checkpoint, show_report

    done = convert_checkpoint(
        args.target,
        out=args.out,
        method=args.method,
        horizon=args.horizon,
        force=args.force,
        verify=args.verify,
    )
    show_report(done)
    return 0 if all(check.passed for check in done.checks) else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
