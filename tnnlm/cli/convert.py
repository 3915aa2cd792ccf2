"""Convert a trained checkpoint into a recurrence, without training and without data.

Writes to RUN/converted: the converted model, its measured errors and perplexities (conversion.json), a model
card (README.md) and, if there is a C++ compiler, the compiled decoding step for float32 weights.

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
  tnnlm convert runs/demo --no-perplexity --no-compile --out runs/demo/quick
  tnnlm convert runs/demo --order 16 --out runs/demo/order16
  tnnlm convert runs/demo --method etsc --out runs/demo/etsc
  tnnlm convert runs/demo --force --compile float32,int8    # with other compiled steps than float32 alone
  tnnlm convert runs/demo/converted --export --onnx         # of a converted model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
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
from tnnlm.inference.linear_choice import BATCH_DTYPES, choose_batch_linear
from tnnlm.inference.speculation_width import PASS_WIDTHS, pass_name

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
BATCH = "batch"
"""Word of ``--compile`` that adds the steps of batches."""
SPECULATE = "speculate"
"""Word of ``--compile`` that adds the passes over several tokens of ``generate.py --speculate``."""
COMPILED = (*DTYPES, BATCH, SPECULATE)
"""Words that ``--compile`` accepts."""
BY_DEFAULT: tuple[str, ...] = ("float32",)
"""Steps that are compiled without ``--compile``, if this machine can."""


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
    _add_output(parser.add_argument_group("output"))
    _add_packages(parser.add_argument_group("compilation and export"))
    return parser


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="Folder of the converted model. (default: RUN/converted)",
    )
    group.add_argument("--force", action="store_true", help="Replace an existing converted model at --out.")
    group.add_argument(
        "--verify",
        action="store_true",
        help="Check the result against slow reference implementations; exit code 1 if a check fails.",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--perplexity-tokens",
        type=positive,
        metavar="N",
        help="Number of validation tokens of each context length that perplexities are measured on. "
        "(default: as many as take about half a minute in all, at least 16 rows of each length)",
    )
    either.add_argument("--no-perplexity", action="store_true", help="Do not measure perplexities.")
    group.add_argument(
        "--inference-only",
        action="store_true",
        help="Omit the kernels (kernels.safetensors), which only training from the converted model needs.",
    )
    group.add_argument(
        "--license",
        metavar="NAME",
        help="License in the model card, such as apache-2.0. (default: none)",
    )
    group.add_argument(
        "--language",
        metavar="CODES",
        type=listed,
        default=[],
        help="Languages in the model card, such as en,de; code for program text. (default: none)",
    )
    group.add_argument(
        "--dataset",
        metavar="NAMES",
        type=listed,
        default=[],
        help="Data sets of the Hub in the model card, for data that was read from files. (default: those of "
        "data.hub_name)",
    )


def _add_packages(group: argparse._ArgumentGroup) -> None:
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--compile",
        nargs="*",
        type=compiled_steps,
        metavar="DTYPE",
        help="Compile the decoding step for weights in float32, bfloat16, float16 and/or int8, separated by "
        "blanks or commas; with the word batch also the step of batches, and with speculate the passes of "
        "generate.py --speculate. Exit code 1 if that fails. (default: float32, if there is a C++ compiler)",
    )
    either.add_argument("--no-compile", action="store_true", help="Do not compile the decoding step.")
    group.add_argument(
        "--export",
        action="store_true",
        help="Export step and prefill with torch.export into export/; the programs run without tnnlm.",
    )
    group.add_argument(
        "--onnx",
        action="store_true",
        help="Export the step as an ONNX model into onnx/; needs the extra [onnx].",
    )


def listed(text: str) -> list[str]:
    """Return the words of an argument that are separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def positive(word: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: If the word is something else.
    """
    if not word.isascii() or not word.isdigit() or not int(word):
        raise argparse.ArgumentTypeError(f"{word}: must be a whole number from 1")
    return int(word)


def compiled_steps(text: str) -> list[str]:
    """Return the words of one argument of ``--compile``, which consumes all arguments up to an option.

    Raises:
        argparse.ArgumentTypeError: If a word is not in ``COMPILED``, such as the name of a run.
    """
    words = text.split(",")
    for word in words:
        if word not in COMPILED:
            raise argparse.ArgumentTypeError(
                f"{word}: is not one of {', '.join(COMPILED)}; put the run or folder before the options"
            )
    return words


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of a command line; None takes ``sys.argv``."""
    parser = arguments()
    args = parser.parse_args(words)
    if args.target == "":
        raise UserError("RUN: is empty", "omit it for the newest run")
    args.recipe = settings_from_flags(ConversionConfig, FLAGS, args)
    args.compiled = selected_steps(args)
    args.exported = [name for name, selected in (("torch", args.export), ("onnx", args.onnx)) if selected]
    args.converted = args.target is not None and is_converted(Path(args.target))
    if args.converted:
        refuse_recipe(args, given_options(parser, words))
    check_effective(parser, words, args, CONDITIONS)
    return args


def selected_steps(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the steps to compile: those of ``--compile``, otherwise the default."""
    if args.compile is None:
        return () if args.no_compile else BY_DEFAULT
    named = dict.fromkeys(word for words in args.compile for word in words)
    dtypes = [word for word in named if word in DTYPES] or ["float32"]
    compiles = [dtype for dtype in dtypes if BATCH in named and choose_batch_linear(dtype) is not None]
    batches = [f"{BATCH}-{dtype}" for dtype in compiles]
    if BATCH in named and not batches:
        raise UserError(
            f"--compile batch: has no effect for {' and '.join(dtypes)} on this CPU",
            f"add {' or '.join(BATCH_DTYPES)}",
        )
    passes = [pass_name(width, dtype) for dtype in dtypes for width in PASS_WIDTHS if SPECULATE in named]
    return (*dtypes, *batches, *passes)


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

    from tnnlm.deployment.card_metadata import Stated
    from tnnlm.deployment.packages import Packages, package_converted
    from tnnlm.deployment.pipeline import convert_checkpoint
    from tnnlm.deployment.table import show_conversion, show_packages

    packages = Packages(args.compiled, args.exported, required=args.compile is not None)
    if args.converted:
        written = package_converted(Path(args.target), packages.without_optional())
        for path in written.packages:
            print(f"wrote {path}")
        for step, reason in written.failures.items():
            print(f"error: {step}: {reason}", file=sys.stderr)
        return 1 if written.failures else 0
    console = Console()
    with errors_name_options(arguments()):
        done = convert_checkpoint(
            args.target,
            args.recipe,
            out=args.out,
            force=args.force,
            verify=args.verify,
            packages=packages,
            perplexity_tokens=0 if args.no_perplexity else args.perplexity_tokens,
            stated=Stated(args.license, args.language, args.dataset),
            device=args.device,
            inference_only=args.inference_only,
            trust=trust_of(args),
            on_complete=partial(show_conversion, console=console),
        )
    show_packages(done, console)
    return 0 if all(check.passed for check in done.checks) and not done.failures else 1
