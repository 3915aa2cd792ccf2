"""Tokenized documents packed into memory-mapped int32 files, cached by a hash of source, split and tokenizer.

A split is one stream of tokens: eos, document, eos, document, eos ... With the protocol ``fairseq`` it is
eos, line, eos, line, eos ... A row of the data set is a window of this stream and may span several documents;
the eos tokens between them don't reset the convolution.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from tnnlm.config.schema import DataConfig
from tnnlm.data.arrow_text import Documents, remove_scratch
from tnnlm.data.chunks import CountedText, batches_of, chunks_of, line_batches_of
from tnnlm.data.progress import at_terminal, progress, reported
from tnnlm.data.report import DataReport, SplitInfo
from tnnlm.data.sampled_coverage import sampled_coverage
from tnnlm.data.sources import cache_folder, load_corpus, source_fingerprint
from tnnlm.data.text import TextHash, words_in
from tnnlm.data.waiting import META, busy, prepare_once, unfinished
from tnnlm.errors import DataError
from tnnlm.files import atomic_folder, flush_to_disk, only_process, remove_leftovers, write_text
from tnnlm.models.batches import PADDING
from tnnlm.tokenizer import TextTokenizer, check_trainable, load_tokenizer, train_bpe

PACKING_VERSION = 4
"""Version in the cache key; increment it whenever the packed tokens change."""
SAVE_SECONDS = 5.0
"""Seconds between the progress records from which a killed preparation resumes."""


@dataclass(frozen=True)
class PackedCorpus:
    """Tokenized corpus on disk."""

    folder: Path
    tokenizer: TextTokenizer
    report: DataReport

    @property
    def train(self) -> SplitInfo:
        """Sizes of the training split."""
        return self.report.splits["train"]

    @property
    def val(self) -> SplitInfo:
        """Sizes of the validation split."""
        return self.report.splits["val"]

    def rows(self, split: str, length: int, max_tokens: int | None = None) -> PackedRows:
        """Return the rows of a split, memory-mapped.

        The validation rows of the protocol ``fairseq`` have every token of the split: the last one is padded.

        Args:
            split: Name of the split, "train" or "val".
            length: Number of input tokens per row; each row also has the target of its last token.
            max_tokens: Maximum number of input tokens; None for the whole split.

        Raises:
            DataError: If the file is missing or has the wrong size.
        """
        path = self.folder / f"{split}.bin"
        n_tokens = self.report.splits[split].tokens
        if not path.is_file() or path.stat().st_size != 4 * n_tokens:
            raise DataError(f"{path}: is missing or damaged", "delete its folder to tokenize the text again")
        used = n_tokens if max_tokens is None else min(n_tokens, max_tokens + 1)
        return _mapped_rows(path, used, length, split == "val" and self.report.protocol == "fairseq")


class PackedRows(torch.utils.data.Dataset[torch.Tensor]):
    """Map-style data set of token rows (L + 1,): row i is tokens i L to i L + L, inclusive.

    The first L tokens are the inputs, and the last L tokens the targets. Tokens after the last whole row are
    skipped, or if ``complete`` are a row that ends in ``PADDING``.
    """

    def __init__(self, tokens: NDArray[np.int32], length: int, complete: bool = False) -> None:
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a memory-mapped file by its name, so that spawned loader workers map it again."""
        if isinstance(self.tokens, np.memmap):
            return _mapped_rows, (self.tokens.filename, len(self.tokens), self.length, self.complete)
        return PackedRows, (self.tokens, self.length, self.complete)


def _mapped_rows(path: Path, n_tokens: int, length: int, complete: bool) -> PackedRows:
    """Return the rows of the first ``n_tokens`` tokens of a file, memory-mapped."""
    return PackedRows(np.memmap(path, dtype=np.int32, mode="r", shape=(n_tokens,)), length, complete)


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
    folder = cache_folder(config) / _key(config, vocab_size, seed, given)
    remove_leftovers(folder.parent)
    if not (folder / META).is_file():
        if given is None:
            check_trainable(config.eos_token, config.mask_token)
        if resumable:
            with _resumable_folder(folder) as part:
                _build(config, vocab_size, seed, given, part)
        else:
            prepare_once(folder, lambda: _build_whole(config, vocab_size, seed, given, folder))
    return _open(folder, config.eos_token)


def _key(config: DataConfig, vocab_size: int, seed: int, given: TextTokenizer | None) -> str:
    tokenizer = given.fingerprint if given else f"bpe {vocab_size}"
    parts = (
        PACKING_VERSION,
        source_fingerprint(config),
        config.val_fraction,
        seed,
        config.eos_token,
        tokenizer,
        *([] if config.mask_token is None else [config.mask_token]),
        *([] if config.protocol == "documents" else [config.protocol]),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path, eos_token: str) -> PackedCorpus:
    report = DataReport.from_dict(json.loads((folder / META).read_text(encoding="utf-8")))
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = TextTokenizer.from_json(text, eos_token, str(folder / "tokenizer.json"))
    return PackedCorpus(folder, tokenizer, report)


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


def _build_whole(
    config: DataConfig, vocab_size: int, seed: int, given: TextTokenizer | None, folder: Path
) -> None:
    """Build the corpus from the start; nothing is left if that fails."""
    with atomic_folder(folder, replace=False) as temporary:
        _build(config, vocab_size, seed, given, temporary)


def _build(config: DataConfig, vocab_size: int, seed: int, given: TextTokenizer | None, folder: Path) -> None:
    """Build the corpus in ``folder``, resuming from the files of an earlier attempt."""
    if not (folder / META).is_file():
        _tokenize(config, vocab_size, seed, given, folder)
    for journal in folder.glob("*.progress"):
        journal.unlink()
    remove_scratch(folder)
    remove_leftovers(folder, owned="*")


def _tokenize(
    config: DataConfig, vocab_size: int, seed: int, given: TextTokenizer | None, folder: Path
) -> None:
    corpus = load_corpus(config, seed, folder)
    if not corpus.train or not corpus.val:
        raise DataError("data: too little text to hold out a validation split", "add text")
    tokenizer = given or _trained(corpus.train, vocab_size, config, folder / "tokenizer.json")
    splits = {
        split: _pack(texts, tokenizer, folder / f"{split}.bin", f"tokenize {split}", config.protocol)
        for split, texts in (("train", corpus.train), ("val", corpus.val))
    }
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    report = replace(corpus.report, splits=splits, protocol=config.protocol)
    if given is not None:  # A trained one is byte-level: it reproduces every text.
        found = sampled_coverage(tokenizer, (corpus.train, corpus.val), config.protocol)
        report = replace(report, checked=found.characters, unknown=found.unknown, changed=found.changed)
    write_text(folder / META, json.dumps(report.to_dict()))


def _trained(texts: Sequence[str], vocab_size: int, config: DataConfig, path: Path) -> TextTokenizer:
    if path.is_file():
        return TextTokenizer.from_json(path.read_text(encoding="utf-8"), config.eos_token, str(path))
    texts_read, visible = CountedText(chunks_of(texts)), at_terminal()
    with contextlib.nullcontext() if visible else reported(lambda: f"train tokenizer: {texts_read}"):
        tokenizer = train_bpe(
            texts_read, vocab_size, config.eos_token, len(texts), visible, config.mask_token
        )
    write_text(path, tokenizer.to_json())
    return tokenizer


def _pack(
    texts: Sequence[str], tokenizer: TextTokenizer, path: Path, title: str, protocol: str = "documents"
) -> SplitInfo:
    """Tokenize documents into a file, resuming from and regularly saving a progress record."""
    done = _packed_before(path)
    if done is None:
        path.write_bytes(np.array([tokenizer.eos_id], dtype=np.int32).tobytes())
        done = SplitInfo(documents=0, tokens=1, bytes=0)
    text_hash = TextHash(done.sha256)
    n_documents, n_tokens, n_bytes, n_words = done.documents, done.tokens, done.bytes, done.words

    def so_far() -> SplitInfo:
        return SplitInfo(n_documents, n_tokens, n_bytes, text_hash.value, n_words)

    rest = texts[n_documents:]
    size = texts.size if isinstance(texts, Documents) else sum(map(len, rest))
    bar = progress(total=size, desc=title, unit="char")
    if isinstance(texts, Documents) and texts:
        bar.update(size * n_documents // len(texts))  # approximate, lengths are unknown
    noted = time.monotonic()
    with path.open("r+b") as file, bar:
        file.truncate(4 * n_tokens)
        file.seek(0, os.SEEK_END)
        for batch in (batches_of if protocol == "documents" else line_batches_of)(rest, tokenizer.encode):
            encodings = tokenizer.encode_batch([chunk.before + chunk.text for chunk in batch])
            for encoding, chunk in zip(encodings, batch, strict=True):
                ids = encoding[chunk.tokens_before :]
                if chunk.ends:
                    ids.append(tokenizer.eos_id)
                n_documents += chunk.ends_document
                file.write(np.array(ids, dtype=np.int32).tobytes())
                n_tokens += len(ids)
                n_words += words_in(chunk.text, chunk.ends)
                # The end token of a line stands for its line end.
                encoded = (chunk.text + "\n" * chunk.ends_line).encode("utf-8", "surrogatepass")
                text_hash.add(encoded, chunk.ends_document)
                n_bytes += len(encoded)
            bar.update(sum(len(chunk.text) for chunk in batch))
            if batch[-1].ends_document and time.monotonic() - noted >= SAVE_SECONDS:
                noted = time.monotonic()
                _note(path, file, so_far())
        _note(path, file, so_far())
    return so_far()


def _journal(path: Path) -> Path:
    return path.with_suffix(".progress")


def _note(path: Path, file: BinaryIO, done: SplitInfo) -> None:
    """Flush the file to disk, then record ``done`` as its progress."""
    file.flush()
    os.fsync(file.fileno())
    write_text(_journal(path), json.dumps(asdict(done)))


def _packed_before(path: Path) -> SplitInfo | None:
    """Return the progress that an earlier attempt recorded, or None if there is none."""
    if not _journal(path).is_file() or not path.is_file():
        return None
    done = SplitInfo(**json.loads(_journal(path).read_text(encoding="utf-8")))
    return done if path.stat().st_size >= 4 * done.tokens else None
