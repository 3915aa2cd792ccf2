"""Convert a trained checkpoint into a recurrence, without training and without data.

Writes to RUN/converted: the converted model, its measured errors and perplexities (conversion.json), and a
model card (README.md).

Methods (--method):
  balanced   few poles that meet a relative tolerance (default)
  etsc       the published algorithm, exact on the horizon
  window     a sliding window of the last inputs
  companion  the exact recurrence of a kernel that defines one, such as rtf
  multirate  the exact recurrence of sgconv, with few operations per token
  auto       per layer, the smallest of these that meets the tolerance
  gradient   poles and residues fitted by Adam, a slow baseline

Examples:
  tnnlm convert                                             # the newest run
  tnnlm convert runs/demo --verify                          # with checks
  tnnlm convert runs/demo --device auto --force             # on the GPU, if there is one
  tnnlm convert runs/demo --order 16 --out runs/demo/order16
  tnnlm convert runs/demo --method etsc --out runs/demo/etsc
  tnnlm convert runs/demo --force --compile float32 int8    # with compiled steps
  tnnlm convert runs/demo/converted --export --onnx         # of a converted model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tnnlm.checkpoints.converted import is_converted
from tnnlm.cli.usage import (
    Condition,
    add_trust,
    check_effective,
    errors_name_options,
    given_options,
    parser_of,
    path_argument,
    trust_of,
)
from tnnlm.config.flags import add_flags, settings_from_flags
from tnnlm.config.methods import USED_BY, Use
from tnnlm.config.schema import ConversionConfig
from tnnlm.errors import UserError
from tnnlm.inference.linear import DTYPES

FLAGS = {
    name: name.removeprefix("gradient_").replace("_", "-")
    for name in (
        "method", "horizon", "tolerance", "order", "poles", "window_taps", "gradient_steps", "gradient_lr"
    )
}  # fmt: skip
"""Options by the setting of ``ConversionConfig`` that they set, without dashes in front."""


def _condition(use: Use) -> Condition:
    """Return the condition of an option that only some methods use."""
    listed, remedy = " and ".join(use.methods), f"add --method {use.methods[0]}"
    if use.without_order:
        listed += f", and to {' and '.join(use.without_order)} without --order"
        remedy = "let it determine the order"
    return Condition(
        lambda args: use.holds(args.method, args.order),
        f"only applies to --method {listed}",
        f"omit it, or {remedy}",
    )


CONDITIONS = {f"--{FLAGS[name]}": _condition(use) for name, use in USED_BY.items()}
"""Conditions under which options have an effect."""
PACKAGING = ("--compile", "--export", "--onnx")
"""Options that apply to a converted model."""


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = parser_of("convert", __doc__)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN | CKPT | CONVERTED",
        help="Run (name or folder) or checkpoint to convert, or a converted model for --compile, --export or "
        "--onnx. (default: the newest run)",
    )
    add_flags(parser.add_argument_group("conversion"), ConversionConfig, FLAGS, {"method": "balanced"})
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="Device on which layers are converted, one at a time, and perplexities are measured: cpu, cuda, "
        "cuda:1 ... or auto. (default: cpu)",
    )
    add_trust(parser.add_argument, compiled=False)
    add = parser.add_argument_group("output").add_argument
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="Folder of the converted model. (default: RUN/converted)",
    )
    add("--force", action="store_true", help="Replace an existing converted model at --out.")
    add(
        "--verify",
        action="store_true",
        help="Check the result against slow reference implementations; exit code 1 if a check fails.",
    )
    add(
        "--license",
        metavar="NAME",
        help="License in the model card, such as apache-2.0. (default: none)",
    )
    add = parser.add_argument_group("compilation and export").add_argument
    add(
        "--compile",
        nargs="*",
        type=dtype,
        metavar="DTYPE",
        help="Compile the decoding step for weights in float32, bfloat16, float16 and/or int8; needs a C++ "
        "compiler. (default without DTYPE: float32)",
    )
    add(
        "--export",
        action="store_true",
        help="Export step and prefill with torch.export into export/; the programs run without tnnlm.",
    )
    add(
        "--onnx",
        action="store_true",
        help="Export the step as an ONNX model into onnx/; needs pip install 'tnnlm[onnx]'.",
    )
    return parser


def dtype(word: str) -> str:
    """Return a dtype after ``--compile``, an option that consumes every word up to the next option.

    Raises:
        argparse.ArgumentTypeError: If the word is not a dtype, such as the name of a run.
    """
    if word not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"{word}: is not one of {', '.join(DTYPES)}; put the run or folder before the options"
        )
    return word


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of a command line; None takes ``sys.argv``."""
    parser = arguments()
    args = parser.parse_args(words)
    if args.target == "":
        raise UserError("RUN: is empty", "omit it for the newest run")
    args.recipe = settings_from_flags(ConversionConfig, FLAGS, args)
    args.compile = () if args.compile is None else args.compile or ("float32",)
    args.export = [name for name, selected in (("torch", args.export), ("onnx", args.onnx)) if selected]
    args.converted = args.target is not None and is_converted(Path(args.target))
    if args.converted:
        refuse_recipe(args, given_options(parser, words))
    check_effective(parser, words, args, CONDITIONS)
    return args


def refuse_recipe(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Raise an error if the given options do not apply to a converted model.

    Raises:
        UserError: If none of ``PACKAGING`` is given, or any other option.
    """
    for option in given:
        if option not in PACKAGING:
            raise UserError(
                f"{args.target}: is already converted, {option} has no effect", "give the run instead"
            )
    if not given:
        raise UserError(
            f"{args.target}: is already converted", "add --compile, --export or --onnx, or give the run"
        )


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
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
    with errors_name_options(arguments()):
        done = convert_checkpoint(
            args.target,
            args.recipe,
            out=args.out,
            force=args.force,
            verify=args.verify,
            compiled=args.compile,
            exported=args.export,
            license=args.license,
            device=args.device,
            trust=trust_of(args),
        )
    show_conversion(done, Console())
    return 0 if all(check.passed for check in done.checks) and not done.failures else 1
