"""Import a checkpoint of another implementation as a run, which convert, generate and train then read.

The run has the weights, their settings and a tokenizer, but no data: convert it to generate text, or start a
new run from it with train --init-from.

Formats (--format):
  tnn           Toeplitz neural network, of fairseq or tnn-pytorch
  sgconv, rtf   SGConv or RTF in the layers of the repository of S4
  hyenadna      HyenaDNA, whose tokenizer is known
  stripedhyena  refused: only its filters are recurrences, see docs/how-to/import.md
  auto          recognised by the keys of the weights (default)

Settings that the weights don't show are key=value pairs, such as model.max_length=512.

Examples:
  tnnlm import checkpoint_best.pt --tokenizer tokenizer.json --output runs/tnn
  tnnlm import hyenadna-tiny-1k.ckpt --output runs/dna
  tnnlm import rtf.ckpt --tokenizer gpt2.json --output runs/rtf model.max_length=1024
  tnnlm import tnn.safetensors --tokenizer gpt2.json --output runs/tnn model.max_length=1024
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tnnlm.checkpoints.importers.formats import AUTO, FORMATS, import_checkpoint
from tnnlm.checkpoints.importers.run import check_absent, write_run
from tnnlm.checkpoints.importers.vocabulary import load_tokenizer
from tnnlm.cli.usage import parser_of, path_argument
from tnnlm.errors import command


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = parser_of("import", __doc__)
    add = parser.add_argument
    add(
        "source",
        type=path_argument,
        metavar="SOURCE",
        help="Checkpoint: a file of torch.save, or .safetensors.",
    )
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Settings that the weights don't show, such as model.max_length=512.",
    )
    add(
        "--format",
        choices=(AUTO, *FORMATS),
        default=AUTO,
        help="Format of the checkpoint; auto recognises it by the keys. (default: auto)",
    )
    add(
        "--output",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="Folder of the run, which must not exist.",
    )
    add(
        "--tokenizer",
        type=path_argument,
        metavar="FILE",
        help="File tokenizer.json with the token ids of the model. (default: that of the format, if any)",
    )
    add(
        "--eos-token",
        metavar="TOKEN",
        help="End-of-document token of the tokenizer. (default: that of the format, or <|endoftext|>)",
    )
    return parser


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; None takes ``sys.argv``."""
    return arguments().parse_intermixed_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    check_absent(args.output)
    imported = import_checkpoint(args.source, args.format, args.overrides)
    tokenizer = load_tokenizer(imported.format, args.tokenizer, args.eos_token)
    write_run(args.output, args.source, imported, tokenizer)
    model = imported.config.model
    sizes = f"{model.n_layers} layers of width {model.d_model}"
    print(f"{args.output}: {imported.format}, {imported.n_params:,} parameters, {sizes}")
    recipe = [] if imported.all_decay else ["--method", "auto"]
    print(f"convert it with: {command('convert', args.output, *recipe)}")
    return 0
