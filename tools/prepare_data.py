#!/usr/bin/env python
"""Prepare the data of a run before it starts: download, tokenize on all cores, pack. For a login node.

The run then reads memory-mapped tokens and touches no network. A preparation that was stopped, killed
even, goes on where it was: the same command again. Settings are those of train.py; what decides the
tokens (source, tokenizer, vocabulary, split, seed) must be the same there.

Examples:
  python tools/prepare_data.py --config configs/tnn_125m_fineweb.yaml
  python tools/prepare_data.py --config configs/tnn_wt103.yaml data.cache_dir=/scratch/tokens
  python tools/prepare_data.py data.source=files 'data.files=[texts/**/*.jsonl]'
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.data.packing import PackedCorpus, prepare
from tnnlm.data.sequences.prepare import prepare_sequences
from tnnlm.data.sequences.rows import LabelledCorpus
from tnnlm.data.tasks import open_rows
from tnnlm.errors import run_script
from tnnlm.training.estimate import make_plan

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (default: configs/demo.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of the file")
    return parser.parse_intermixed_args()


def main() -> int:
    args = parse()
    config = load_config(args.config or DEMO, args.overrides)
    if config.task == "classify":
        show_sequences(prepare_sequences(config), config)
        say_next(args)
        return 0
    try:
        corpus = prepare(config.data, config.model.vocab_size, config.seed, resumable=True)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    open_rows(corpus, config)
    show(corpus, config)
    say_next(args)
    return 0


def say_next(args: argparse.Namespace) -> None:
    words = ["python", "train.py", *(["--config", args.config] if args.config else []), *args.overrides]
    print(f"train on it, without network: HF_HUB_OFFLINE=1 {shlex.join(words)}")


def show_sequences(corpus: LabelledCorpus, config: Config) -> None:
    print(f"{corpus.folder}: {folder_bytes(corpus.folder) / 1e9:,.3f} GB")
    for name, rows in corpus.rows.items():
        share = corpus.split(name, config.model.max_length).majority
        print(f"{name}: {rows:,} sequences; the commonest class is {share:.2%} of them")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def show(corpus: PackedCorpus, config: Config) -> None:
    print(f"{corpus.folder}: {folder_bytes(corpus.folder) / 1e9:,.3f} GB")
    for name, split in (("train", corpus.train), ("validation", corpus.val)):
        print(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes of text, {split.tokens:,} tokens "
            f"({split.bytes_per_token:.2f} bytes each)"
        )
    print(f"tokenizer: {corpus.tokenizer.size:,} entries, end token {corpus.tokenizer.eos_token}")
    planned = make_plan(config).total_tokens
    print(f"the run reads {planned:,} tokens: {planned / corpus.train.tokens:.2f} passes over the text")


if __name__ == "__main__":
    sys.exit(run_script(main))
