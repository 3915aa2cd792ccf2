"""Documents as packed int32 tokens in memory-mapped files, cached under a key of our own.

A split is one stream: eos, document, eos, document, eos ... A row of the data set is a window of
it. The convolution of a row reads across the eos between documents.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tnnlm.atomic import atomic_folder, write_text
from tnnlm.config import DataConfig
from tnnlm.corpus import cache_folder, load_corpus, source_fingerprint
from tnnlm.errors import DataError
from tnnlm.tokenizer import TextTokenizer, load_tokenizer, train_bpe

PACKING_VERSION = 2
"""part of the cache's key: raise it when the packed tokens change"""
PIECE = 1 << 18
"""characters of a long document that are tokenized at a time"""
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
        """The rows of ``split`` ("train" or "val"), ``length`` tokens and their successors each."""
        tokens = np.memmap(self.folder / f"{split}.bin", dtype=np.int32, mode="r")
        return PackedRows(tokens if max_tokens is None else tokens[: max_tokens + 1], length)


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


def prepare(config: DataConfig, vocab_size: int, seed: int) -> PackedCorpus:
    """Tokenize the corpus, or find it tokenized.

    Raises:
        DataError: for unusable text or tokenizer. Nothing is left in the cache then.
    """
    given = load_tokenizer(config.tokenizer, config.eos_token) if config.tokenizer else None
    if given is not None and given.size > vocab_size:
        raise DataError(
            f"{config.tokenizer}: has {given.size} tokens, the model {vocab_size}: "
            f"set model.vocab_size={given.size} or more"
        )
    folder = cache_folder(config) / _key(config, vocab_size, seed, given)
    if not (folder / "meta.json").is_file():
        with atomic_folder(folder, replace=False) as temporary:
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
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path, eos_token: str) -> PackedCorpus:
    meta = json.loads((folder / "meta.json").read_text())
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = TextTokenizer.from_json(text, eos_token, str(folder / "tokenizer.json"))
    return PackedCorpus(folder, tokenizer, SplitInfo(**meta["train"]), SplitInfo(**meta["val"]))


def _build(config: DataConfig, vocab_size: int, seed: int, given: TextTokenizer | None, folder: Path) -> None:
    corpus = load_corpus(config, seed)
    if not corpus.train or not corpus.val:
        raise DataError("too little text to hold some out for validation: give more of it")
    progress = sys.stderr.isatty()
    pieces = [piece.text for piece in _pieces(corpus.train)]
    tokenizer = given or train_bpe(pieces, vocab_size, config.eos_token, len(pieces), progress)
    meta = {}
    for split, texts in (("train", corpus.train), ("val", corpus.val)):
        meta[split] = asdict(_pack(texts, tokenizer, folder / f"{split}.bin", f"tokenize {split}"))
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    write_text(folder / "meta.json", json.dumps(meta))


def _pack(texts: list[str], tokenizer: TextTokenizer, path: Path, title: str) -> SplitInfo:
    n_tokens = 1
    n_bytes = 0
    bar = tqdm(total=sum(map(len, texts)), desc=title, unit="char", unit_scale=True, disable=None)
    with path.open("wb") as file, bar:
        file.write(np.array([tokenizer.eos_id], dtype=np.int32).tobytes())
        for batch in _batches(texts):
            for ids, piece in zip(tokenizer.encode_batch([p.text for p in batch]), batch, strict=True):
                if piece.ends_document:
                    ids.append(tokenizer.eos_id)
                file.write(np.array(ids, dtype=np.int32).tobytes())
                n_tokens += len(ids)
            n_bytes += sum(len(piece.text.encode("utf-8", "surrogatepass")) for piece in batch)
            bar.update(sum(len(piece.text) for piece in batch))
    return SplitInfo(documents=len(texts), tokens=n_tokens, bytes=n_bytes)


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


def _batches(texts: list[str], characters: int = 4 * PIECE) -> Iterator[list[_Piece]]:
    """Batches of about equal text: the tokenizer works on one with all cores."""
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
