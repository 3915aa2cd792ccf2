"""Documents as packed int32 tokens in memory-mapped files, cached under a key of our own.

A split is one stream: eos, document, eos, document, eos ... A row of the data set is a window of
it. The convolution of a row reads across the eos between documents.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tnnlm.atomic import atomic_folder, write_text
from tnnlm.config import DataConfig
from tnnlm.corpus import cache_folder, load_corpus, source_fingerprint
from tnnlm.errors import DataError
from tnnlm.tokenizer import TextTokenizer, load_tokenizer, train_bpe

PACKING_VERSION = 1
"""part of the cache's key: raise it when the packed tokens change"""


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
    tokenizer = given or train_bpe(corpus.train, vocab_size, config.eos_token, len(corpus.train), progress)
    meta = {}
    for split, texts in (("train", corpus.train), ("val", corpus.val)):
        meta[split] = asdict(_pack(texts, tokenizer, folder / f"{split}.bin", f"tokenize {split}"))
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    write_text(folder / "meta.json", json.dumps(meta))


def _pack(texts: list[str], tokenizer: TextTokenizer, path: Path, title: str) -> SplitInfo:
    n_tokens = 1
    n_bytes = 0
    with path.open("wb") as file, tqdm(total=len(texts), desc=title, unit="doc", disable=None) as bar:
        file.write(np.array([tokenizer.eos_id], dtype=np.int32).tobytes())
        for batch in _batches(texts):
            for ids in tokenizer.encode_batch(batch):
                file.write(np.array([*ids, tokenizer.eos_id], dtype=np.int32).tobytes())
                n_tokens += len(ids) + 1
            n_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
            bar.update(len(batch))
    return SplitInfo(documents=len(texts), tokens=n_tokens, bytes=n_bytes)


def _batches(texts: list[str], characters: int = 4_000_000) -> Iterator[list[str]]:
    """Batches of about equal text: the tokenizer works on one with all cores."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
