"""Tokenized documents in memory-mapped shards, cached by a hash of source, split and tokenizer.

A split is one stream of tokens: eos, document, eos, document, eos ... With the protocol ``fairseq`` it is
eos, line, eos, line, eos ... A row of the data set is a window of this stream and may span several documents;
the eos tokens between them don't reset the convolution.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tnnlm.checksums import list_files, write_signed
from tnnlm.config.schema import DataConfig
from tnnlm.data.arrow_text import remove_scratch
from tnnlm.data.chunks import CountedText, chunks_of
from tnnlm.data.earlier import StoredCorpus, copy_earlier
from tnnlm.data.prepared import META, is_prepared, open_prepared, read_entries, verify_files, write_meta
from tnnlm.data.progress import at_terminal, reported
from tnnlm.data.report import DataReport, SplitInfo
from tnnlm.data.sampled_coverage import sampled_coverage
from tnnlm.data.sources import cache_folder, load_corpus, source_fingerprint
from tnnlm.data.stored_texts import characters_of, documents_of
from tnnlm.data.token_files import Layout, StoredTokens
from tnnlm.data.token_sources import import_tokens
from tnnlm.data.tokenize_split import tokenize_split
from tnnlm.data.waiting import busy, prepare_once, unfinished
from tnnlm.errors import DataError
from tnnlm.files import atomic_folder, flush_to_disk, only_process, remove_leftovers, write_text
from tnnlm.models.batches import PADDING
from tnnlm.tokenizer import TextTokenizer, check_trainable, load_tokenizer, train_bpe

PACKING_VERSION = 5
"""Version in the cache key; increment it whenever the packed tokens or their files change."""
TOKENIZER = "tokenizer.json"
"""File of the tokenizer in a folder of the cache."""


@dataclass(frozen=True)
class PackedCorpus:
    """Tokenized corpus on disk."""

    folder: Path
    tokenizer: TextTokenizer
    report: DataReport
    layout: Layout
    """Format of the shards."""

    @property
    def parts(self) -> list[PackedCorpus]:
        """This corpus, as a mixture of one source."""
        return [self]

    @property
    def train(self) -> SplitInfo:
        """Sizes of the training split."""
        return self.report.splits["train"]

    @property
    def val(self) -> SplitInfo:
        """Sizes of the validation split."""
        return self.report.splits["val"]

    def shards(self, split: str) -> list[str]:
        """Return the names of the files of a split."""
        return self.layout.shards(split, self.report.splits[split].tokens)

    def rows(self, split: str, length: int, max_tokens: int | None = None) -> PackedRows:
        """Return the rows of a split, memory-mapped.

        The validation rows of the protocol ``fairseq`` have every token of the split: the last one is padded.

        Args:
            split: Name of the split, "train" or "val".
            length: Number of input tokens per row; each row also has the target of its last token.
            max_tokens: Maximum number of input tokens; None for the whole split.
        """
        n_tokens = self.report.splits[split].tokens
        used = n_tokens if max_tokens is None else min(n_tokens, max_tokens + 1)
        stored = StoredTokens(self.folder, split, self.layout, used)
        return PackedRows(stored, length, split == "val" and self.report.protocol == "fairseq")


class PackedRows(torch.utils.data.Dataset[torch.Tensor]):
    """Map-style data set of token rows (L + 1,): row i is tokens i L to i L + L, inclusive.

    The first L tokens are the inputs, and the last L tokens the targets. Tokens after the last whole row are
    skipped, or if ``complete`` are a row that ends in ``PADDING``.
    """

    def __init__(self, tokens: NDArray[Any] | StoredTokens, length: int, complete: bool = False) -> None:
        self.tokens = tokens
        self.length = length
        self.complete = complete

    def __len__(self) -> int:
        rest = self.length - 1 if self.complete else 0
        return max(0, (len(self.tokens) - 1 + rest) // self.length)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)  # required to end ``for row in rows``
        start = index * self.length
        row = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
        return torch.nn.functional.pad(row, (0, self.length + 1 - len(row)), value=PADDING)


def prepare(config: DataConfig, vocab_size: int, seed: int, resumable: bool = False) -> PackedCorpus:
    """Tokenize and pack the corpus, or load it from the cache.

    Args:
        config: Data settings: source, split and tokenizer.
        vocab_size: Vocabulary size of the model; a tokenizer of this size is trained if none is given.
        seed: Seed of the train/validation split.
        resumable: Keep partial results if interrupted, and resume from them the next time.

    Raises:
        DataError: If the text, the tokenizer or a special token is unusable, or, if ``resumable``, another
            process prepares the same data; otherwise it is waited for, see
            :func:`~tnnlm.data.waiting.prepare_once`. The cache is then unchanged, apart from partial results
            if ``resumable``.
    """
    given = load_tokenizer(config.tokenizer, config.eos_token) if config.tokenizer else None
    if given is not None and config.mask_token is not None:
        given = given.with_special(config.mask_token)
    if given is not None and given.size > vocab_size:
        raise DataError(
            f"{config.tokenizer}: has {given.size} tokens, the model only {vocab_size}",
            f"set model.vocab_size={given.size} or more",
        )
    request = Request(config, vocab_size, seed, given)
    folder = request.folder()
    remove_leftovers(folder.parent)
    if not is_prepared(folder):
        if given is None:
            check_trainable(config.eos_token, config.mask_token)
        if resumable:
            with _resumable_folder(folder) as part:
                _build(request, part)
        else:
            prepare_once(folder, lambda: build_whole(request))
    return _open(folder, config.eos_token)


@dataclass(frozen=True)
class Request:
    """Everything that decides the tokens of a corpus."""

    config: DataConfig
    vocab_size: int
    seed: int
    given: TextTokenizer | None
    """Tokenizer; None to train one of ``vocab_size`` tokens."""

    @cached_property
    def _source(self) -> str:
        return source_fingerprint(self.config)

    def folder(self, version: int = PACKING_VERSION) -> Path:
        """Return the folder of the cache that has, or had in an earlier version, these tokens."""
        config, default = self.config, DataConfig.tokenizer_sample
        parts = (
            version,
            self._source,
            config.val_fraction,
            self.seed,
            config.eos_token,
            self.given.fingerprint if self.given else f"bpe {self.vocab_size}",
            *([] if config.mask_token is None else [config.mask_token]),
            *([] if config.protocol == "documents" else [config.protocol]),
            *([] if config.tokenizer_sample == default else [("sample", config.tokenizer_sample)]),
        )
        return cache_folder(config) / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path, eos_token: str) -> PackedCorpus:
    def opened(meta: dict[str, Any]) -> PackedCorpus:
        path = folder / TOKENIZER
        tokenizer = TextTokenizer.from_json(path.read_text(encoding="utf-8"), eos_token, str(path))
        return PackedCorpus(folder, tokenizer, DataReport.from_dict(meta), Layout(*meta["layout"]))

    return open_prepared(folder, opened)


@contextmanager
def _resumable_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to ``path`` if the block succeeds, and kept if it fails."""
    part = unfinished(path)
    with only_process(part, busy(path)):
        part.mkdir(exist_ok=True)
        try:
            yield part
        except BaseException:
            with contextlib.suppress(OSError):
                part.rmdir()  # succeeds only if the folder is empty
            raise
        for done in part.iterdir():
            flush_to_disk(done)
        if path.exists():  # created by a process that does not see the lock, on some network file systems
            shutil.rmtree(part)
        else:
            os.replace(part, path)


def build_whole(request: Request) -> None:
    """Build the corpus from the start; nothing is left if that fails."""
    with atomic_folder(request.folder(), replace=False) as temporary:
        _build(request, temporary)


def _build(request: Request, folder: Path) -> None:
    """Build the corpus in ``folder``, resuming from the files of an earlier attempt."""
    if not (folder / META).is_file():
        old = request.folder(PACKING_VERSION - 1)
        tokens = copy_earlier(old, folder) if (old / META).is_file() else None
        if tokens is None:
            tokens = _tokenize(request, folder)
        files = {**tokens.files, **list_files(folder, [TOKENIZER])}
        entries = {**tokens.report.to_dict(), "layout": [*tokens.layout]}
        write_meta(folder, request.folder().name, entries, files)
    for journal in folder.glob("*.progress"):
        journal.unlink()
    remove_scratch(folder)
    remove_leftovers(folder, owned="*")


def _tokenize(request: Request, folder: Path) -> StoredCorpus:
    config, given = request.config, request.given
    if config.source == "tokens":
        assert given is not None  # checked by the configuration loader
        stored = import_tokens(config, given, folder)
        if not all(info.tokens for info in stored.report.splits.values()):
            raise DataError("data.tokens: too few tokens to hold out a validation split", "add tokens")
        write_text(folder / TOKENIZER, given.to_json())
        return stored
    corpus = load_corpus(config, request.seed, folder)
    if not corpus.train or not corpus.val:
        raise DataError("data: too little text to hold out a validation split", "add text")
    tokenizer, sampled = (given, 0) if given else _trained(corpus.train, request.vocab_size, config, folder)
    layout = Layout.of(tokenizer.size)
    splits = {
        split: tokenize_split(texts, tokenizer, folder, split, layout, config.protocol)
        for split, texts in (("train", corpus.train), ("val", corpus.val))
    }
    write_text(folder / TOKENIZER, tokenizer.to_json())
    infos = {split: written.info for split, written in splits.items()}
    report = replace(corpus.report, splits=infos, protocol=config.protocol, sampled=sampled)
    if given is not None:  # A trained one is byte-level: it reproduces every text.
        found = sampled_coverage(tokenizer, (corpus.train, corpus.val), config.protocol)
        report = replace(report, checked=found.characters, unknown=found.unknown, changed=found.changed)
    files = {name: entry for written in splits.values() for name, entry in written.files.items()}
    return StoredCorpus(report, layout, files)


def _trained(
    texts: Sequence[str], vocab_size: int, config: DataConfig, folder: Path
) -> tuple[TextTokenizer, int]:
    """Train a tokenizer in ``folder``, or take the one of an earlier attempt.

    Returns:
        The tokenizer, and the characters that it was trained on if they are a sample, else 0.
    """
    path, record = folder / TOKENIZER, folder / "tokenizer.progress"
    if os.path.lexists(record):
        entries = read_entries(record)
        verify_files(folder, entries.get("checksums", entries))
        return TextTokenizer.from_json(
            path.read_text(encoding="utf-8"), config.eos_token, str(path)
        ), entries.get("sampled", 0)
    size, limit = characters_of(texts), config.tokenizer_sample
    texts_read, visible = CountedText(chunks_of(documents_of(texts)), min(1, limit / size)), at_terminal()
    with contextlib.nullcontext() if visible else reported(lambda: f"train tokenizer: {texts_read}"):
        tokenizer = train_bpe(
            texts_read, vocab_size, config.eos_token, len(texts), visible, config.mask_token
        )
    write_text(path, tokenizer.to_json())
    sampled = texts_read.characters if size > limit else 0
    write_signed(record, {"checksums": list_files(folder, [TOKENIZER]), "sampled": sampled})
    return tokenizer, sampled
