#!/usr/bin/env python
"""Benchmark the preparation of one large text file against batch encoding of the tokenizers package alone.

Each measurement has a separate process, one after another: reading, splitting, tokenizing, packing and
checksums of a file of generated source code by this package, and the tokenization alone of the same text by
encode_batch_fast. Peak memory is that of the whole process.

Examples:
  python tools/benchmark_data.py                     # a file of 1,000 MB
  python tools/benchmark_data.py --megabytes 50 --check
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from tnnlm.config.schema import DataConfig
from tnnlm.data.chunks import chunks_of
from tnnlm.data.mixture import open_text_corpus
from tnnlm.data.packing import PackedCorpus
from tnnlm.data.stored_texts import PIECE, read_text
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.machine.threads import limit_threads
from tnnlm.tokenizer import TextTokenizer, train_bpe

MEGABYTE = 1_000_000
EOS = "<|endoftext|>"


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--megabytes", type=int, default=1000, metavar="N", help="Size of the text. (default: 1000)")
    add("--vocab-size", type=int, default=4096, metavar="N", help="Size of the tokenizer. (default: 4096)")
    add(
        "--check",
        action="store_true",
        help="Compare the tokens with those of the text as a whole; takes about 100 bytes per character.",
    )
    add("--json", action="store_true", help="Print the result as JSON.")
    add("--step", choices=(*STEPS,), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of a command line; None takes ``sys.argv``."""
    args = arguments().parse_args(words)
    if args.megabytes < 1:
        raise UserError(f"--megabytes {args.megabytes}: must be at least 1")
    return args


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(words)
    limit_threads()
    if args.step:
        began = time.perf_counter()
        found = STEPS[args.step](args.folder)
        seconds = found.pop("seconds", time.perf_counter() - began)
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), **found}))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text_file(folder / "text.txt", args.megabytes * MEGABYTE)
        write_tokenizer(folder, args.vocab_size)
        steps = ["encode", "prepare", *(["check"] if args.check else [])]
        result = {step: run_step(step, folder) for step in steps}
    result["speed"] = {"ratio": result["encode"]["seconds"] / result["prepare"]["seconds"]}
    print(json.dumps(result) if args.json else table(result, args.megabytes))
    return 0


def table(result: dict[str, Any], megabytes: int) -> str:
    """Return the measurements as lines of text."""
    lines = []
    for step, what in (("encode", "encode_batch_fast alone"), ("prepare", "preparation")):
        found = result[step]
        lines.append(
            f"{what}: {megabytes / found['seconds']:.1f} MB/s, {found['tokens']:,} tokens, "
            f"peak memory {found['peak_bytes'] / MEGABYTE:,.0f} MB"
        )
    lines.append(f"speed of the preparation: {result['speed']['ratio']:.0%} of that of encoding alone")
    if "check" in result:
        lines.append(f"tokens equal to those of the whole text: {result['check']['equal']}")
    return "\n".join(lines)


def run_step(step: str, folder: Path) -> dict[str, Any]:
    """Run a step in a separate process and return its measurements."""
    words = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    done = subprocess.run(words, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # The operating system's own figure would be at least that of the parent process.
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource  # missing on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_text_file(path: Path, size: int) -> None:
    """Write source code of the standard library, with a number in every file, until ``size`` bytes."""
    corpus = sorted(Path(json.__file__).parents[1].glob("*.py"))
    sources = [source.read_text(encoding="utf-8", errors="ignore") for source in corpus]
    with path.open("w", encoding="utf-8") as file:
        written = 0
        for number, text in enumerate(cycle(sources)):
            changed = text.replace("self", f"self{number}").replace("return ", f"return x{number % 977} ")
            written += file.write(f"# file {number}\n{changed}\n")
            if written >= size:
                return


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Train a tokenizer on the beginning of the text."""
    with (folder / "text.txt").open("rb") as file:
        sample = [chunk.text for chunk in chunks_of([read_text(file, 0, 20 * PIECE)])]
    tokenizer = train_bpe(sample, vocab_size, EOS, len(sample), progress=False)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")


def encode(folder: Path) -> dict[str, Any]:
    """Encode the text in batches of the package's chunks and drop the tokens."""
    tokenizer = read_tokenizer(folder)
    seconds, tokens = 0.0, 0
    for batch in batches(folder / "text.txt"):
        began = time.perf_counter()
        encodings = tokenizer.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - began
        tokens += sum(map(len, encodings))
    return {"tokens": tokens, "seconds": seconds}


def batches(path: Path, size: int = 16) -> Iterator[list[str]]:
    """Yield the chunks of a file in lists."""
    batch: list[str] = []
    with path.open("rb") as file:
        for chunk in chunks_of([read_text(file, 0, path.stat().st_size)]):
            batch.append(chunk.text)
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def prepare(folder: Path) -> dict[str, Any]:
    """Prepare the text as a run does."""
    corpus = opened(folder)
    return {"tokens": corpus.train.tokens + corpus.val.tokens}


def check(folder: Path) -> dict[str, Any]:
    """Compare the prepared tokens with those of each split as a whole."""
    corpus, tokenizer = opened(folder), read_tokenizer(folder)
    text = (folder / "text.txt").read_text(encoding="utf-8")
    equal = True
    for split, info in (("train", corpus.train), ("val", corpus.val)):
        part, text = text.encode()[: info.bytes].decode(), text.encode()[info.bytes :].decode()
        stored = corpus.rows(split, 1).tokens[1 : info.tokens - 1]
        equal = equal and stored.tolist() == tokenizer.encode(part)
    return {"equal": equal and not text}


def opened(folder: Path) -> PackedCorpus:
    """Return the prepared text."""
    config = DataConfig(
        source="files",
        files=[str(folder / "text.txt")],
        tokenizer=str(folder / "tokenizer.json"),
        cache_dir=str(folder / "cache"),
    )
    corpus = open_text_corpus(config, 1 << 16, 0, resumable=True)
    assert isinstance(corpus, PackedCorpus)
    return corpus


def read_tokenizer(folder: Path) -> TextTokenizer:
    """Return the tokenizer of the text."""
    return TextTokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"), EOS)


STEPS = {"encode": encode, "prepare": prepare, "check": check}
"""Functions that run in a separate process, by name."""

if __name__ == "__main__":
    sys.exit(run_script(main))
