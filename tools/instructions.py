#!/usr/bin/env python
"""Write instruction pairs for fine-tuning, or check the answers of a model that was fine-tuned on them.

The pairs ask for small Python functions. A tenth of the combinations of operation, name and arguments is held
out; ``check`` asks a converted model for these, runs its answers, and prints the share that is right.

Examples:
  python tools/instructions.py write pairs.jsonl
  python tools/instructions.py check --model runs/demo-2 --show 3
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from instruction_pairs.running import Answer, results
from instruction_pairs.tasks import Task, pair, tasks
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import check_file, write_text
from tnnlm.inference.chat import encode_chats, until
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.load import load_engine
from tnnlm.inference.sampling import SamplingParams

LONGEST_ANSWER = 64
"""Largest number of tokens of an answer."""
BATCH = 50
"""Number of instructions that are answered at once."""


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="Write training pairs.")
    write.add_argument("file", type=Path, help="Output, a .jsonl file.")
    write.add_argument("--count", type=int, default=20_000, help="Number of pairs. (default: 20000)")
    write.add_argument("--seed", type=int, default=0, help="Seed of their choice. (default: 0)")
    check = commands.add_parser("check", help="Check the answers of a model to held-out instructions.")
    check.add_argument("--model", required=True, help="Converted model, run or checkpoint.")
    check.add_argument("--count", type=int, default=200, help="Number of instructions. (default: 200)")
    check.add_argument("--seed", type=int, default=1, help="Seed of their choice. (default: 1)")
    check.add_argument("--show", type=int, default=0, metavar="N", help="Print N wrong answers. (default: 0)")
    return parser.parse_args()


def main() -> int:
    """Run the command and return its exit code."""
    args = parse()
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    chosen = [*islice(tasks(args.command == "check", args.seed), args.count)]
    if len(chosen) < args.count:
        raise UserError(f"--count {args.count}: there are only {len(chosen):,}", "give a smaller number")
    if args.command == "write":
        check_file(args.file)
        write_text(args.file, "".join(json.dumps(pair(task)) + "\n" for task in chosen))
        print(f"{args.file}: {len(chosen):,} pairs")
        return 0
    engine = load_engine(args.model, Path("runs"), device="auto", dtype="float32", engine="auto")
    answers = answers_of(engine.generator, chosen)
    report(chosen, answers, args.show)
    return 0


def answers_of(generator: TextGenerator, chosen: list[Task]) -> list[str]:
    """Return the answers of a model to instructions, by greedy decoding in batches."""
    greedy, texts = SamplingParams(temperature=0), []
    rows, closing = encode_chats(generator.tokenizer, [task.instruction for task in chosen])
    for start in range(0, len(rows), BATCH):
        state = generator.prefill_tokens(rows[start : start + BATCH])
        records = generator.generate(state, LONGEST_ANSWER, greedy)
        texts += [until(closing, record.text) for record in records]
    return texts


def report(chosen: list[Task], answers: list[str], n_shown: int) -> None:
    """Print the shares of answers that run and that are right, and some that are not."""
    found = results([_call(task, text.strip()) for task, text in zip(chosen, answers, strict=True)])
    ran, right = sum(one is not None for one in found), sum(one is True for one in found)
    for index in [index for index, one in enumerate(found) if not one][:n_shown]:
        print(f"--- {chosen[index].instruction}\n{answers[index].strip()}", file=sys.stderr)
    n = len(chosen)
    print(f"{n} held-out instructions: {ran / n:.1%} run, {right / n:.1%} are right")


def _call(task: Task, source: str) -> Answer:
    """Return an answer with the results that it has to return."""
    inputs = task.operation.inputs
    return Answer(source, task.name, inputs, [task.operation.function(*given) for given in inputs])


if __name__ == "__main__":
    sys.exit(run_script(main))
