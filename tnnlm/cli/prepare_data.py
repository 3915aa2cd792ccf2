"""Download, tokenize and pack the data of a run before training, for example on a cluster's login node.

Training then memory-maps the tokens and needs no network. Tokenization uses all cores. After an interruption,
run the same command again to resume. Settings are those of train.py: give both commands the same data source,
tokenizer, vocabulary size, split and seed.

Examples:
  tnnlm prepare-data --config tnn_125m_fineweb
  tnnlm prepare-data --config tnn_wt103 data.cache_dir=/scratch/tokens
  tnnlm prepare-data 'data.files=[corpus/**/*.jsonl]'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tnnlm.cli.configured import configured
from tnnlm.cli.usage import add_settings, given_options, parser_of
from tnnlm.config.schema import Config
from tnnlm.data.conversations.prepare import ConversationCorpus, prepare_conversations
from tnnlm.data.mixture import MixedCorpus, open_text_corpus
from tnnlm.data.packing import PackedCorpus
from tnnlm.data.sequences.prepare import prepare_sequences
from tnnlm.data.sequences.rows import LabelledCorpus
from tnnlm.data.tasks import split_answers, split_rows
from tnnlm.errors import command
from tnnlm.training.estimate import estimate_run


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of("prepare-data", __doc__)
    add_settings(parser)
    return parser


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; None takes ``sys.argv``."""
    parser = arguments()
    args = parser.parse_intermixed_args(words)
    args.named = "--config" in given_options(parser, words)
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    config, _ = configured(args.config, args.overrides, named=args.named)
    if config.task == "classify":
        show_sequences(prepare_sequences(config), config)
    elif config.data.format != "text":
        show_conversations(prepare_conversations(config), config)
    else:
        try:
            corpus = open_text_corpus(config.data, config.model.vocab_size, config.seed, resumable=True)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            return 130
        split_rows(corpus, config)
        show(corpus, config)
    words = [*(["--config", args.config] if args.config != "demo" else []), *args.overrides]
    print(f"to train offline, run: HF_HUB_OFFLINE=1 {command('train', *words)}")
    return 0


def show_sequences(corpus: LabelledCorpus, config: Config) -> None:
    """Print the report, size, sequences and majority class of the labelled data."""
    print(*corpus.report.lines(), sep="\n")
    print(f"{corpus.folder}: {folder_bytes(corpus.folder) / 1e9:,.3f} GB")
    for name, rows in corpus.rows.items():
        share = corpus.split(name, config.model.max_length).majority
        print(f"{name}: {rows:,} sequences; {share:.2%} are of the most frequent class")


def show_conversations(corpus: ConversationCorpus, config: Config) -> None:
    """Print the report and size of conversations, and the epochs that the run trains."""
    train, _, report = split_answers(corpus, config)
    print(*report.lines(), sep="\n")
    print(f"{corpus.folder}: {folder_bytes(corpus.folder) / 1e9:,.3f} GB")
    planned = estimate_run(config)
    rows = planned.total_tokens // config.model.max_length
    print(f"the run trains on {rows:,} rows: {rows / len(train):.2f} epochs of {len(train):,} rows")


def folder_bytes(folder: Path) -> int:
    """Return the size of the files of a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir())


def show(corpus: PackedCorpus | MixedCorpus, config: Config) -> None:
    """Print the report, size and tokenizer of the packed data, and the epochs that the run trains."""
    print(*corpus.report.lines(), sep="\n")
    for part in corpus.parts:
        print(f"{part.folder}: {folder_bytes(part.folder) / 1e9:,.3f} GB")
    for name, split in (("train", corpus.train), ("validation", corpus.val)):
        print(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes of text, {split.tokens:,} tokens "
            f"({split.bytes_per_token:.2f} bytes per token)"
        )
    print(f"tokenizer: {corpus.tokenizer.size:,} entries, end token {corpus.tokenizer.eos_token}")
    planned = estimate_run(config).total_tokens
    rows = corpus.rows("train", config.model.max_length)
    epochs = planned / (len(rows) * config.model.max_length)
    print(f"the run trains on {planned:,} tokens: {epochs:.2f} epochs of {len(rows):,} rows")
