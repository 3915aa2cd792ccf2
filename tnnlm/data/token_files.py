"""Token ids of a split on disk: shards of bounded size, written one after another and memory-mapped lazily.

Ids are little-endian unsigned integers of 16 bits where the vocabulary allows it, otherwise of 32 bits. Shard
i holds tokens i S to (i + 1) S - 1 of the stream, so a row may begin in one shard and end in the next. Many
machines can read the shards from one disk: each maps only those with its rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from tnnlm.checksums import check_size, differs, file_hash
from tnnlm.errors import DataError
from tnnlm.reading import unreadable

SHARD_BYTES = 1 << 28
"""Largest number of bytes of a shard: what is read again after a kill, and the unit of verification."""


class Layout(NamedTuple):
    """Format of the shards of a split."""

    dtype: str
    """NumPy's name of the type of an id."""
    per_shard: int
    """Number of tokens S of every shard but the last."""

    @classmethod
    def of(cls, vocab_size: int) -> Layout:
        """Return the layout for ids below ``vocab_size``."""
        dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        return cls(dtype, SHARD_BYTES // np.dtype(dtype).itemsize)

    @property
    def itemsize(self) -> int:
        """Number of bytes per token."""
        return np.dtype(self.dtype).itemsize

    def shards(self, split: str, n_tokens: int) -> list[str]:
        """Return the file names of ``n_tokens`` tokens of a split."""
        return [shard_name(split, number) for number in range(-(-n_tokens // self.per_shard))]


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:05}.bin"


class StoredTokens:
    """First tokens of a split on disk, (n,). Slices are arrays; a shard is mapped when it is first read.

    Pickled by the name of the folder, so that spawned loader workers map the files again.
    """

    def __init__(self, folder: Path, split: str, layout: Layout, n_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._layout = layout
        self._n_tokens = n_tokens
        self._mapped: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, part: slice) -> NDArray[Any]:
        """Return the tokens of a slice without step; a copy only where it spans several shards."""
        start, stop, _ = part.indices(self._n_tokens)
        stop, size = max(start, stop), self._layout.per_shard
        pieces = [
            self._shard(number)[max(0, start - number * size) : stop - number * size]
            for number in range(start // size, -(-stop // size))
        ]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self._layout.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTokens, (self._folder, self._split, self._layout, self._n_tokens)

    def _shard(self, number: int) -> NDArray[Any]:
        if number not in self._mapped:
            path = self._folder / shard_name(self._split, number)
            self._mapped[number] = np.memmap(path, self._layout.dtype, mode="r")
        return self._mapped[number]


class TokenWriter:
    """Writer of the shards of a split, which continues an earlier one after a kill."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        self.layout = layout
        self.n_tokens = 0
        """Number of tokens written so far."""
        self._folder = folder
        self._split = split
        self._whole: list[str] = []
        self._file: BinaryIO | None = None
        self._hash = xxhash.xxh3_128()

    @property
    def checksums(self) -> list[str]:
        """XXH3 checksum of each shard, the unfinished one included."""
        return [*self._whole, self._hash.hexdigest()] if self._filled else [*self._whole]

    @property
    def _filled(self) -> int:
        """Number of tokens in the last shard, 0 if it isn't begun."""
        return self.n_tokens - len(self._whole) * self.layout.per_shard

    def resume(self, n_tokens: int, checksums: Sequence[str], remedy: str) -> None:
        """Continue after the first ``n_tokens`` of an earlier writer; what it wrote behind them is dropped.

        Args:
            n_tokens: Number of tokens at some time.
            checksums: Value of :attr:`checksums` at that time.
            remedy: Remedy of the error.

        Raises:
            DataError: If a shard is missing, too short, or has another content.
        """
        whole, filled = divmod(n_tokens, self.layout.per_shard)
        names = self.layout.shards(self._split, n_tokens)
        sizes = [self.layout.per_shard] * whole + [filled] * (filled > 0)
        for name, size, expected in zip(names, sizes, checksums, strict=True):
            path, n_bytes = self._folder / name, size * self.layout.itemsize
            check_size(path, [n_bytes, expected], remedy, DataError, longer=True)
            try:
                with path.open("rb", buffering=0) as file:
                    self._hash = file_hash(file, n_bytes)
            except OSError as error:
                raise unreadable(path, error, remedy, DataError) from None
            if self._hash.hexdigest() != expected:
                raise differs(path, remedy, DataError)
        for path in self._folder.glob(f"{self._split}-*.bin"):
            if path.name not in names:
                path.unlink()
        self.n_tokens, self._whole = n_tokens, [*checksums[:whole]]
        if filled:
            self._opened()  # truncates it
        else:
            self._hash = xxhash.xxh3_128()

    def files(self) -> dict[str, list[Any]]:
        """Return size in bytes and checksum of each shard, for :func:`~tnnlm.data.prepared.verify_files`."""
        names, size = self.layout.shards(self._split, self.n_tokens), self.layout.per_shard
        left = [min(size, self.n_tokens - number * size) for number in range(len(names))]
        return {
            name: [n * self.layout.itemsize, found]
            for name, n, found in zip(names, left, self.checksums, strict=True)
        }

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """Append token ids.

        Args:
            ids: Token ids, (n,). Those in an array have to fit the type of the layout.

        Raises:
            OverflowError: If one in a list doesn't fit.
        """
        data = np.array(ids, self.layout.dtype)
        while len(data):
            part, data = np.split(data, [self.layout.per_shard - self._filled])
            raw = part.tobytes()
            self._opened().write(raw)
            self._hash.update(raw)
            self.n_tokens += len(part)
            if self._filled == self.layout.per_shard:
                self.close()
                self._whole.append(self._hash.hexdigest())
                self._hash.reset()

    def sync(self) -> None:
        """Flush what was written to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush the open shard to disk and close it."""
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> BinaryIO:
        """Return the file of the shard that is written, without what a killed process wrote behind."""
        if self._file is None:
            path = self._folder / shard_name(self._split, len(self._whole))
            self._file = path.open("r+b") if self._filled else path.open("wb")
            self._file.truncate(self._filled * self.layout.itemsize)
            self._file.seek(0, os.SEEK_END)
        return self._file
