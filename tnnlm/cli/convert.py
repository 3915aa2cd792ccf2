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
from tnnlm.config.flags import add_flags, settings_from_flags
from tnnlm.config.schema import ConversionConfig
from tnnlm.errors import UserError
from tnnlm.inference.linear import DTYPES

FLAGS = {
    name: name.removeprefix("gradient_").replace("_", "-")
    for name in (
        "method", "horizon", "tolerance", "order", "poles", "window_taps", "gradient_steps", "gradient_lr"
    )
}  # fmt: skip
"""settings of a conversion -> their flags"""


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = parser_of("convert", __doc__)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN | CKPT | CONVERTED",
        help="run folder or name, or a checkpoint (default: newest run); or a converted model's folder, for "
        "--compile, --export and --onnx alone",
    )
    add_flags(parser.add_argument_group("conversion"), ConversionConfig, FLAGS, {"method": "balanced"})
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="default: RUN/converted")
    add("--force", action="store_true", help="replace a converted model at --out")
    add("--verify", action="store_true", help="compare with slow references; exit 1 if off")
    add(
        "--license",
        metavar="NAME",
        help="of the model, for its card, such as apache-2.0 (default: not stated)",
    )
    add = parser.add_argument_group("other forms").add_argument
    add(
        "--compile",
        nargs="*",
        type=dtype,
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
    return parser


def dtype(word: str) -> str:
    """One word after ``--compile``, which takes all that follow it.

    Raises:
        argparse.ArgumentTypeError: if it is something else, such as the run.
    """
    if word not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"{word}: is not one of {', '.join(DTYPES)}; the run or folder goes before the options"
        )
    return word


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; ``words`` are those of the command line, None takes them from there."""
    parser = arguments()
    args = parser.parse_args(words)
    args.recipe = settings_from_flags(ConversionConfig, FLAGS, args)
    args.compile = () if args.compile is None else args.compile or ("float32",)
    args.export = [form for form, wanted in (("torch", args.export), ("onnx", args.onnx)) if wanted]
    args.converted = args.target is not None and is_converted(Path(args.target))
    if args.converted:
        refuse_recipe(parser, args)
    return args


def refuse_recipe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What a finished conversion has no use for is an error, and so is nothing to do."""
    used = ("target", "compile", "export", "onnx", "converted", "recipe")
    for name, value in vars(args).items():
        if name not in used and value != parser.get_default(name):
            option = "--" + FLAGS.get(name, name)
            raise UserError(
                f"{args.target}: is converted already, {option} has no use", "name the run instead"
            )
    if not args.compile and not args.export:
        raise UserError(
            f"{args.target}: is converted already", "add --compile, --export or --onnx, or name the run"
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
    done = convert_checkpoint(
        args.target,
        args.recipe,
        out=args.out,
        force=args.force,
        verify=args.verify,
        compiled=args.compile,
        exported=args.export,
        license=args.license,
    )
    show_conversion(done, Console())
    return 0 if all(check.passed for check in done.checks) and not done.failures else 1
