"""Documents as packed int32 tokens in memory-mapped files, cached under a key of our own.

A split is one stream: eos, document, eos, document, eos ... A row of the data set is a window of
it. The convolution of a row reads across the eos between documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tnnlm.config.schema import DataConfig
from tnnlm.data.arrow_text import Documents, remove_scratch
from tnnlm.data.sources import cache_folder, load_corpus, source_fingerprint
from tnnlm.errors import DataError
from tnnlm.files import atomic_folder, flush_to_disk, only_process, write_text
from tnnlm.tokenizer import TextTokenizer, load_tokenizer, train_bpe

PACKING_VERSION = 2
"""part of the cache's key: raise it when the packed tokens change"""
PIECE = 1 << 18
"""characters of a long document that are tokenized at a time"""
SAVE_SECONDS = 5.0
"""between the notes that a killed preparation goes on from"""
_BORDER = re.compile(r"\n(?=\S)")


@dataclass(frozen=True)
class SplitInfo:
    """Sizes of one split."""

    documents: int
    tokens: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, the eos among the tokens."""
        return self.bytes / self.tokens


@dataclass(frozen=True)
class PackedCorpus:
    """A tokenized corpus on disk."""

    folder: Path
    tokenizer: TextTokenizer
    train: SplitInfo
    val: SplitInfo

    def rows(self, split: str, length: int, max_tokens: int | None = None) -> PackedRows:
        """The rows of ``split`` ("train" or "val"), ``length`` tokens and their successors each.

        Raises:
            DataError: if the file is not what was written.
        """
        path = self.folder / f"{split}.bin"
        n_tokens = {"train": self.train, "val": self.val}[split].tokens
        if not path.is_file() or path.stat().st_size != 4 * n_tokens:
            raise DataError(
                f"{path}: is missing or damaged", "delete its folder, it is made again from the text"
            )
        return _mapped_rows(path, n_tokens if max_tokens is None else min(n_tokens, max_tokens + 1), length)


class PackedRows(torch.utils.data.Dataset[torch.Tensor]):
    """Row i is tokens [i L, i L + L], (L + 1,): inputs and targets overlap by all but one."""

    def __init__(self, tokens: NDArray[np.int32], length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends ``for row in rows``
        start = index * self.length
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a mapped file by its name: a loader process that is spawned maps it, and copies nothing."""
        if isinstance(self.tokens, np.memmap):
            return _mapped_rows, (self.tokens.filename, len(self.tokens), self.length)
        return PackedRows, (self.tokens, self.length)


def _mapped_rows(path: Path, n_tokens: int, length: int) -> PackedRows:
    """The rows of the first ``n_tokens`` tokens of a file."""
    return PackedRows(np.memmap(path, dtype=np.int32, mode="r", shape=(n_tokens,)), length)


def prepare(config: DataConfig, vocab_size: int, seed: int, resumable: bool = False) -> PackedCorpus:
    """Tokenize the corpus, or find it tokenized.

    Args:
        config: where the text comes from and how it becomes tokens.
        vocab_size: of the model; a tokenizer is trained for it if none is given.
        seed: of the split.
        resumable: keep what is done when stopped, to go on from there the next time.

    Raises:
        DataError: for unusable text or tokenizer, and if another process prepares the same. Nothing is
            left in the cache then, unless it is ``resumable``.
    """
    given = load_tokenizer(config.tokenizer, config.eos_token) if config.tokenizer else None
    if given is not None and config.mask_token is not None:
        given = given.with_special(config.mask_token)
    if given is not None and given.size > vocab_size:
        raise DataError(
            f"{config.tokenizer}: has {given.size} tokens, the model {vocab_size}",
            f"set model.vocab_size={given.size} or more",
        )
    folder = cache_folder(config) / _key(config, vocab_size, seed, given)
    if not (folder / "meta.json").is_file():
        made = _resumable_folder(folder) if resumable else atomic_folder(folder, replace=False)
        with made as temporary:
            _build(config, vocab_size, seed, given, temporary)
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
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path, eos_token: str) -> PackedCorpus:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = TextTokenizer.from_json(text, eos_token, str(folder / "tokenizer.json"))
    return PackedCorpus(folder, tokenizer, SplitInfo(**meta["train"]), SplitInfo(**meta["val"]))


@contextmanager
def _resumable_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that stays if the block fails, and is moved there when it ends."""
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    refusal = DataError(f"{part}: another process prepares the same data", "wait until it is done")
    with only_process(part, refusal):
        part.mkdir(exist_ok=True)
        try:
            yield part
        except BaseException:
            with contextlib.suppress(OSError):
                part.rmdir()  # only if nothing was done yet
            raise
        for done in part.iterdir():
            flush_to_disk(done)
        if path.exists():  # made by a training in the meantime
            shutil.rmtree(part)
        else:
            os.replace(part, path)


def _build(config: DataConfig, vocab_size: int, seed: int, given: TextTokenizer | None, folder: Path) -> None:
    """Fill ``folder``, going on from what an earlier attempt left in it."""
    if not (folder / "meta.json").is_file():
        _tokenize(config, vocab_size, seed, given, folder)
    for journal in folder.glob("*.progress"):
        journal.unlink()
    remove_scratch(folder)


def _tokenize(
    config: DataConfig, vocab_size: int, seed: int, given: TextTokenizer | None, folder: Path
) -> None:
    corpus = load_corpus(config, seed, folder)
    if not corpus.train or not corpus.val:
        raise DataError("too little text to hold some out for validation", "give more of it")
    tokenizer = given or _trained(corpus.train, vocab_size, config, folder / "tokenizer.json")
    meta = {}
    for split, texts in (("train", corpus.train), ("val", corpus.val)):
        meta[split] = asdict(_pack(texts, tokenizer, folder / f"{split}.bin", f"tokenize {split}"))
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    write_text(folder / "meta.json", json.dumps(meta))


def _trained(texts: Sequence[str], vocab_size: int, config: DataConfig, path: Path) -> TextTokenizer:
    if path.is_file():
        return TextTokenizer.from_json(path.read_text(encoding="utf-8"), config.eos_token, str(path))
    pieces = (piece.text for piece in _pieces(texts))
    tokenizer = train_bpe(
        pieces, vocab_size, config.eos_token, len(texts), sys.stderr.isatty(), config.mask_token
    )
    write_text(path, tokenizer.to_json())
    return tokenizer


def _pack(texts: Sequence[str], tokenizer: TextTokenizer, path: Path, title: str) -> SplitInfo:
    """Write the tokens of ``texts``; every few seconds a note of what is safely on the disk."""
    done = _packed_before(path)
    if done is None:
        path.write_bytes(np.array([tokenizer.eos_id], dtype=np.int32).tobytes())
        done = SplitInfo(documents=0, tokens=1, bytes=0)
    n_documents, n_tokens, n_bytes = done.documents, done.tokens, done.bytes
    rest = texts[n_documents:]
    size = texts.size if isinstance(texts, Documents) else sum(map(len, rest))
    bar = tqdm(total=size, desc=title, unit="char", unit_scale=True, disable=None)
    if isinstance(texts, Documents) and texts:
        bar.update(size * n_documents // len(texts))  # about: lengths are not kept
    noted = time.monotonic()
    with path.open("r+b") as file, bar:
        file.truncate(4 * n_tokens)
        file.seek(0, os.SEEK_END)
        for batch in _batches(rest):
            for ids, piece in zip(tokenizer.encode_batch([p.text for p in batch]), batch, strict=True):
                if piece.ends_document:
                    ids.append(tokenizer.eos_id)
                    n_documents += 1
                file.write(np.array(ids, dtype=np.int32).tobytes())
                n_tokens += len(ids)
            n_bytes += sum(len(piece.text.encode("utf-8", "surrogatepass")) for piece in batch)
            bar.update(sum(len(piece.text) for piece in batch))
            if batch[-1].ends_document and time.monotonic() - noted >= SAVE_SECONDS:
                noted = time.monotonic()
                _note(path, file, SplitInfo(n_documents, n_tokens, n_bytes))
        _note(path, file, SplitInfo(n_documents, n_tokens, n_bytes))
    return SplitInfo(n_documents, n_tokens, n_bytes)


def _journal(path: Path) -> Path:
    return path.with_suffix(".progress")


def _note(path: Path, file: BinaryIO, done: SplitInfo) -> None:
    """Say that ``done`` is on the disk, once it is."""
    file.flush()
    os.fsync(file.fileno())
    write_text(_journal(path), json.dumps(asdict(done)))


def _packed_before(path: Path) -> SplitInfo | None:
    """What an earlier attempt brought safely to the disk."""
    if not _journal(path).is_file() or not path.is_file():
        return None
    done = SplitInfo(**json.loads(_journal(path).read_text(encoding="utf-8")))
    return done if path.stat().st_size >= 4 * done.tokens else None


class _Piece(NamedTuple):
    text: str
    ends_document: bool


def _pieces(texts: Iterable[str], characters: int = PIECE) -> Iterator[_Piece]:
    """Documents, the long ones in pieces that all cores can share.

    A piece ends at a line border before a character that is no space: no token of a byte-level
    BPE reaches across such a border.
    """
    for text in texts:
        start = 0
        while start < len(text):
            border = _BORDER.search(text, start + characters)
            stop = border.start() + 1 if border else len(text)
            yield _Piece(text[start:stop], stop == len(text))
            start = stop


def _batches(texts: Iterable[str]) -> Iterator[list[_Piece]]:
    """Batches of about equal text: the tokenizer works on one with all cores."""
    characters = PIECE * max(4, os.cpu_count() or 1)
    batch: list[_Piece] = []
    size = 0
    for piece in _pieces(texts):
        batch.append(piece)
        size += len(piece.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
