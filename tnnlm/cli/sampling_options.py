"""Options of sampling and constrained output, and what they select."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tnnlm.cli.usage import Condition, path_argument
from tnnlm.errors import UserError
from tnnlm.reading import read_json

if TYPE_CHECKING:
    from tnnlm.inference.generator import TextGenerator
    from tnnlm.inference.grammar import Grammar
    from tnnlm.inference.sampling import SamplingParams

PENALTIES = (
    (
        *("--min-p", 0.0, "P"),
        "Sample from tokens of at least P times the probability of the most likely one; 0 disables it.",
    ),
    (
        *("--repetition-penalty", 1.0, "R"),
        "Divide positive logits of tokens that the prompt or the completion contains by R, and multiply "
        "negative ones.",
    ),
    (
        *("--presence-penalty", 0.0, "X"),
        "Subtract X from the logits of tokens that the completion contains.",
    ),
    (
        *("--frequency-penalty", 0.0, "X"),
        "Subtract X from the logit of a token for each time that the completion contains it.",
    ),
)
"""Options of sampling that are off by default."""
_NO_PROPOSALS = Condition(
    lambda args: not args.speculate,
    "depends on each token before, so that --speculate can propose none",
    "omit one of them",
)
CONDITIONS = {
    "--repetition-penalty": _NO_PROPOSALS,
    "--presence-penalty": _NO_PROPOSALS,
    "--frequency-penalty": _NO_PROPOSALS,
    "--regex": _NO_PROPOSALS,
    "--json-schema": Condition(
        lambda args: args.regex is None and not args.speculate,
        "can't be combined with --regex, nor with --speculate",
        "omit one of them",
    ),
}
"""Conditions under which options of this module have an effect."""


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling, and those of constrained output, to a parser."""
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="Maximum number of new tokens. (default: 256)",
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="Sampling temperature; 0 is greedy decoding. (default: 0.8)",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="Sample from the K most likely tokens; 0 disables the limit. (default: 0)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="Sample from the most likely tokens whose probabilities add up to P. (default: 1.0)",
    )
    for option, default, metavar, text in PENALTIES:
        add(option, type=float, default=default, metavar=metavar, help=f"{text} (default: {default})")
    add("--seed", type=int, metavar="S", help="Random seed. (default: a different seed each time)")
    add(
        "--num-samples", type=int, default=1, metavar="N", help="Completions of the same prompt. (default: 1)"
    )
    add = parser.add_argument_group("constrained output").add_argument
    add(
        "--json-schema",
        type=path_argument,
        metavar="FILE",
        help="Generate JSON, in one line, that the schema of a file describes. Needs llguidance, the extra "
        "[constrained].",
    )
    add(
        "--regex",
        metavar="PATTERN",
        help="Generate text that matches a regular expression as a whole. Needs llguidance, the extra "
        "[constrained].",
    )


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """Return the sampling parameters.

    Raises:
        UserError: If one is out of range.
    """
    from tnnlm.inference.sampling import SamplingParams

    names = [field.name for field in dataclasses.fields(SamplingParams)]
    return SamplingParams(**{name: getattr(args, name) for name in names})


def grammar_of(args: argparse.Namespace) -> Callable[[TextGenerator], Grammar | None]:
    """Return a function that compiles the grammar of completions for a model, if one is given.

    Raises:
        UserError: If the file of a schema can't be read, or llguidance is missing.
    """
    from tnnlm.inference.grammar import GrammarCompiler, check_installed

    if args.json_schema is not None:
        check_installed("--json-schema")
        schema: Any = read_json(args.json_schema, "give another schema", UserError)
        place = f"--json-schema {args.json_schema}"
        return lambda generator: GrammarCompiler(generator.tokenizer).json_schema(schema, place)
    if args.regex is not None:
        check_installed("--regex")
        return lambda generator: GrammarCompiler(generator.tokenizer).regex(args.regex, "--regex")
    return lambda generator: None
