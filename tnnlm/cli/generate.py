"""Generate text with a converted model: parallel prefill, then constant time and memory per token.

Completions go to stdout, the selected engine to stderr, and so does the model if --model is omitted.

Examples:
  tnnlm generate --prompt "def main("                  # the newest converted model
  tnnlm generate --model runs/demo --prompt "import " --temperature 0
  tnnlm generate --prompt "The " --num-samples 4 --seed 1
  tnnlm generate --prompt "import " --speculate ngram  # several tokens per pass
  tnnlm generate --prompts lines.txt                   # a batch, one prompt per line
  cat story.txt | tnnlm generate --prompt - --json
  tnnlm generate --interactive
  tnnlm generate --chat --prompt "What is a list?"     # a model that was fine-tuned on conversations
  tnnlm generate --chat                                # a dialogue
  tnnlm generate --prompt "Once" --save-state s1       # continue later with:
  tnnlm generate --load-state s1 --prompt " more"
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tnnlm.cli.sampling_options import CONDITIONS as SAMPLING_CONDITIONS
from tnnlm.cli.sampling_options import add_sampling, grammar_of, sampling_of
from tnnlm.cli.usage import (
    Condition,
    add_device,
    add_trust,
    check_effective,
    errors_name_options,
    parser_of,
    path_argument,
    trust_of,
)
from tnnlm.errors import UserError
from tnnlm.files import check_file
from tnnlm.reading import read_bytes

if TYPE_CHECKING:
    from tnnlm.inference.session import GenerationSession

CONDITIONS = {
    "--prompt": Condition(
        lambda args: not args.prompts and not (args.prompt == "-" and args.interactive),
        "can't be combined with --prompts, nor - with --interactive, which reads stdin too",
        "omit one of them",
    ),
    "--interactive": Condition(
        lambda args: not args.prompts, "takes prompts from stdin, not from --prompts", "omit one of them"
    ),
    "--num-samples": Condition(
        lambda args: args.num_samples == 1 or not (args.prompts or dialogue(args)),
        "applies to a single prompt",
        "omit it, or give --prompt alone",
    ),
    "--speculate": Condition(
        lambda args: args.speculate == "ngram" or (args.num_samples == 1 and not args.prompts),
        "a draft model applies to one completion at a time",
        "use ngram, or omit --prompts and --num-samples",
    ),
    "--json": Condition(
        lambda args: not dialogue(args),
        "can't be combined with --interactive or another dialogue",
        "omit --interactive, or give --prompt",
    ),
    "--save-state": Condition(
        lambda args: args.num_samples == 1 and not args.chat,
        "saves the state of one sample, without the messages of a chat",
        "omit --num-samples and --chat",
    ),
    "--load-state": Condition(
        lambda args: not args.chat, "has no messages, which --chat continues", "omit one of them"
    ),
}
"""Conditions under which options have an effect."""


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of("generate", __doc__)
    _add_input(parser)
    add_sampling(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="Print completions, timings and state size as JSON.")
    add(
        "--save-state",
        type=path_argument,
        metavar="FILE",
        help="Save the state after the last token for --load-state.",
    )
    add = parser.add_argument_group("model and machine").add_argument
    add(
        "--model",
        metavar="DIR|RUN|CKPT",
        help="Converted model, run or checkpoint. (default: the newest converted model under runs/)",
    )
    add_device(add)
    add(
        "--engine",
        default="auto",
        metavar="NAME",
        help="Engine: compiled (CPU), graph (GPU), packed or eager; auto selects the first available one. "
        "(default: auto)",
    )
    add(
        "--speculate",
        metavar="ngram|MODEL",
        help="Speculative decoding: check several proposed tokens per pass over the weights, which changes "
        "the speed alone. ngram proposes what followed earlier in the text; MODEL is a smaller converted "
        "model with the same tokenizer. (default: none)",
    )
    add_trust(add)
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("--prompt", metavar="TEXT", help="Prompt; - reads it from stdin.")
    add(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="File with one prompt per line, generated as one batch.",
    )
    add(
        "--interactive",
        action="store_true",
        help="Take one prompt per line of stdin and keep the state between them; Ctrl-D exits.",
    )
    add(
        "--chat",
        action="store_true",
        help="Apply the chat template of the model: --prompt is a message, whose answer is printed. Without "
        "--prompt and --prompts, or with --interactive, lines of stdin are messages of a dialogue, and the "
        "state is kept between them.",
    )
    add(
        "--load-state",
        type=path_argument,
        metavar="FILE",
        help="Continue from a saved state; --prompt is optional then.",
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of a command line; None takes ``sys.argv``."""
    parser = arguments()
    args = parser.parse_args(words)
    if args.prompt is None and not (args.interactive or args.prompts or args.load_state or args.chat):
        raise UserError(
            "--prompt: is missing",
            "give --prompt TEXT, --prompts FILE, --load-state FILE, --interactive or --chat",
        )
    check_effective(parser, words, args, CONDITIONS | SAMPLING_CONDITIONS)
    if args.speculate == "":
        raise UserError("--speculate: is empty", "give ngram or a converted model")
    if args.model == "":
        raise UserError("--model: is empty", "omit it for the newest converted model")
    if not 1 <= args.num_samples <= 10_000:
        raise UserError(f"--num-samples {args.num_samples}: must be from 1 to 10,000")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be from 0 to 2^63 - 1")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    prompt = args.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")
    if prompt == "":
        raise UserError("--prompt: is empty", "give at least one character")
    prompts = read_prompts(args.prompts) if args.prompts else []
    with errors_name_options(arguments()):
        session = load_session(args)
    if dialogue(args) and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that isn't UTF-8 is refused by itself
    if args.chat:
        from tnnlm.inference.chat import chat

        given = prompts or ([] if prompt is None else [prompt])
        chat(session, given, dialogue=dialogue(args), as_json=args.json, n_samples=args.num_samples)
    elif args.interactive:
        session.converse(prompt, sys.stdin, sys.stdout)
    elif prompts and args.json:
        print(json.dumps(session.measure_batch(prompts), ensure_ascii=False))
    elif prompts:
        session.show_batch(prompts, sys.stdout)
    elif args.json:
        print(json.dumps(session.measure(prompt, args.num_samples), ensure_ascii=False))
    else:
        session.show(prompt, args.num_samples, sys.stdout)
    if args.save_state:
        session.save_state(args.save_state)
    return 0


def dialogue(args: argparse.Namespace) -> bool:
    """Return whether lines of stdin are prompts."""
    return args.interactive or (args.chat and args.prompt is None and not args.prompts)


def load_session(args: argparse.Namespace) -> GenerationSession:
    """Check the arguments, load the model, and restore the saved state if one is given.

    Raises:
        UserError: If an argument is out of range, or the model or the state can't be loaded.
    """
    from tnnlm.checkpoints.locate import find_for_decoding, outdated
    from tnnlm.inference.generator import check_new_tokens
    from tnnlm.inference.load import load_engine
    from tnnlm.inference.session import GenerationSession
    from tnnlm.machine.threads import limit_threads

    if args.save_state:
        check_file(args.save_state)
    sampling, grammar = sampling_of(args), grammar_of(args)
    check_new_tokens(args.max_new_tokens)
    trust = trust_of(args)
    model = str(find_for_decoding(args.model, Path("runs")))
    if warning := outdated(model, Path("runs")):
        print(f"warning: {warning}", file=sys.stderr)
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(6), "big")
    limit_threads()
    engine = load_engine(
        model,
        Path("runs"),
        device=args.device,
        dtype=args.dtype,
        engine=args.engine,
        trust=trust,
        speculate=args.speculate,
    )
    generator = engine.generator
    session = GenerationSession(
        generator, sampling, args.max_new_tokens, seed, engine.info, grammar(generator)
    )
    if args.load_state:
        session.load_state(args.load_state, reseed=args.seed is not None)
    if args.model is None:
        print(f"model: {model}", file=sys.stderr)
    if not args.json:
        print(f"[{session.engine}]", file=sys.stderr)
    return session


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a file that are not empty.

    Raises:
        UserError: If the file cannot be read as text or has no such line.
    """
    try:
        # A pipe of the shell, <(command), is open already; another one might never have a writer.
        passed = path.is_fifo() and path.is_relative_to("/dev")
        data = path.read_bytes() if passed else read_bytes(path, "give a text file", UserError)
        # splitlines() would also split at characters such as U+2028, which may be part of a prompt.
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file with one prompt per line") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: contains no prompts")
    return prompts
