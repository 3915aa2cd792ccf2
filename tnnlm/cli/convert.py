"""Turn a trained checkpoint into a recurrence: in closed form, without training and without data.

Examples:
  tnnlm convert                          # the newest run's best checkpoint -> RUN/converted/
  tnnlm convert runs/demo --verify       # and compare with the slow references; exit 1 if off
  tnnlm convert runs/demo --order 16 --out runs/demo/order16
  tnnlm convert runs/demo --method etsc --out runs/demo/etsc
  tnnlm convert runs/demo --force --compile float32 int8    # compiled steps for generate.py
  tnnlm convert runs/demo/converted --export --onnx         # of a model that is converted already

Methods: balanced (few poles within a tolerance), etsc (exact, as published), window (the last inputs
themselves), companion (the recurrence that an rtf kernel has by itself), auto (the smallest of these that
meets the tolerance, per layer), gradient (fitted by Adam).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tnnlm.checkpoints.converted import is_converted
from tnnlm.cli.usage import parser_of
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import METHODS
from tnnlm.errors import UserError
from tnnlm.inference.linear import DTYPES


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; ``words`` are those of the command line, None takes them from there."""
    parser = parser_of("convert", __doc__)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN | CKPT | CONVERTED",
        help="run folder or name, or a checkpoint (default: newest run); or a converted model's folder, for "
        "--compile, --export and --onnx alone",
    )
    add_recipe(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="default: RUN/converted")
    add("--force", action="store_true", help="replace a converted model at --out")
    add("--verify", action="store_true", help="compare with slow references; exit 1 if off")
    add = parser.add_argument_group("other forms").add_argument
    add(
        "--compile",
        nargs="*",
        choices=DTYPES,
        metavar="DTYPE",
        help="compile the decoding step, for float32 (default), bfloat16, int8 weights; needs a C++ compiler",
    )
    add(
        "--export",
        action="store_true",
        help="write step and prefill as programs that torch alone runs (torch.export), into export/",
    )
    add(
        "--onnx",
        action="store_true",
        help="write the step as an ONNX model, into onnx/; needs the extra [onnx]",
    )
    args = parser.parse_args(words)
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
    add = parser.add_argument_group("conversion").add_argument
    add("--method", choices=METHODS, default="balanced", help="default: balanced")
    add(
        "--horizon",
        default="auto",
        metavar="N|auto",
        help="lags that must be right; auto (default): until the kernel's rest is float32 rounding",
    )
    add(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help="relative tap error for balanced, auto (default: 1e-3)",
    )
    add("--order", type=int, metavar="N", help="state numbers per channel, instead of a tolerance")
    add("--poles", choices=("shared", "channel"), default="shared", help="one set per layer, or per channel")
    add("--window-taps", type=int, default=0, metavar="P", help="balanced: keep the first P lags exactly")
    add("--steps", type=int, default=2000, metavar="N", help="of Adam, for gradient")
    add("--lr", type=float, default=1e-2, metavar="X", help="its learning rate, for gradient")


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


def main(words: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    args = parse(words)
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
