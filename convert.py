#!/usr/bin/env python
"""Turn a trained checkpoint into a recurrence: in closed form, without training and without data.

Examples:
  python convert.py                          # the newest run's best checkpoint -> RUN/converted/
  python convert.py runs/demo --verify       # and compare with the slow references; exit 1 if off
  python convert.py runs/demo --order 16 --out runs/demo/order16
  python convert.py runs/demo --method etsc --out runs/demo/etsc
  python convert.py runs/demo --force --compile float32 int8    # compiled steps for generate.py
  python convert.py runs/demo/converted --export --onnx         # of a model that is converted already

Methods: balanced (few poles within a tolerance), etsc (exact, as published), window (the last inputs
themselves), companion (the recurrence that an rtf kernel has by itself), auto (the smallest of these that
meets the tolerance, per layer), gradient (fitted by Adam).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tnnlm.checkpoints.converted import is_converted
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import METHODS
from tnnlm.errors import UserError, run_script
from tnnlm.inference.linear import DTYPES


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN | CKPT | CONVERTED",
        help="run folder or name, or a checkpoint (default: newest run); or a converted model's folder, for "
        "--compile, --export and --onnx alone",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/converted")
    add_recipe(parser)
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=DTYPES,
        metavar="DTYPE",
        help="compile the decoding step, for float32 (default), bfloat16, int8 weights; needs a C++ compiler",
    )
    parser.add_argument(
        "--export",
        action="store_true",
        help="write step and prefill as programs that torch alone runs (torch.export), into export/",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="write the step as an ONNX model, into onnx/; needs the extra [onnx]",
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
    args.compile = () if args.compile is None else args.compile or ("float32",)
    args.export = [form for form, wanted in (("torch", args.export), ("onnx", args.onnx)) if wanted]
    args.converted = args.target is not None and is_converted(Path(args.target))
    if args.converted:
        refuse_recipe(parser, args)
    return args


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """How kernels are converted."""
    parser.add_argument("--method", choices=METHODS, default="balanced", help="default: balanced")
    parser.add_argument(
        "--horizon",
        default="auto",
        metavar="N|auto",
        help="lags that must be right; auto (default): until the kernel's rest is float32 rounding",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help="relative tap error for balanced, auto (default: 1e-3)",
    )
    parser.add_argument(
        "--order", type=int, metavar="N", help="state numbers per channel, instead of a tolerance"
    )
    parser.add_argument(
        "--poles", choices=("shared", "channel"), default="shared", help="one set per layer, or per channel"
    )
    parser.add_argument(
        "--window-taps", type=int, default=0, metavar="P", help="balanced: keep the first P lags exactly"
    )
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of Adam, for gradient")
    parser.add_argument("--lr", type=float, default=1e-2, metavar="X", help="its learning rate, for gradient")


def refuse_recipe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What a finished conversion has no use for is an error, and so is nothing to do."""
    used = ("target", "compile", "export", "onnx", "converted")
    for name, value in vars(args).items():
        if name not in used and value != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{args.target}: is converted already, {option} has no use; name the run instead")
    if not args.compile and not args.export:
        raise UserError(
            f"{args.target}: is converted already; add --compile, --export or --onnx, or name the run"
        )


def main() -> int:
    args = parse()
    from rich.console import Console

    from tnnlm.deployment.pipeline import convert_checkpoint, package_converted
    from tnnlm.deployment.table import show_conversion

    if args.converted:
        written, failures = package_converted(Path(args.target), args.compile, args.export)
        for path in written:
            print(f"wrote {path}")
        for step, reason in failures.items():
            print(f"error: {step}: {reason}", file=sys.stderr)
        return 1 if failures else 0
    recipe = ConversionConfig(
        method=args.method,
        horizon=args.horizon,
        tolerance=args.tolerance,
        order=args.order,
        poles=args.poles,
        window_taps=args.window_taps,
        gradient_steps=args.steps,
        gradient_lr=args.lr,
    )
    done = convert_checkpoint(
        args.target,
        recipe,
        out=args.out,
        force=args.force,
        verify=args.verify,
        compiled=args.compile,
        exported=args.export,
    )
    show_conversion(done, Console())
    return 0 if all(check.passed for check in done.checks) and not done.failures else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
