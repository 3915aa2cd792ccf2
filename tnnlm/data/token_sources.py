"""Token ids that another program prepared: .bin and .npy files, and Megatron's pairs of .bin and .idx.

They are copied in bounded parts into the shards of the cache, so that every id is checked against the
vocabulary once, and training maps verified files.
"""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnnlm.config.schema import DataConfig
from tnnlm.data.earlier import StoredCorpus
from tnnlm.data.progress import progress
from tnnlm.data.report import DataReport, SplitInfo
from tnnlm.data.token_files import Layout, TokenWriter
from tnnlm.data.tokenize_split import WrittenSplit
from tnnlm.errors import DataError, one_line
from tnnlm.reading import check_regular
from tnnlm.tokenizer import TextTokenizer

BLOCK = 1 << 20
"""Tokens that are read at a time."""
MAGIC = b"MMIDIDX\x00\x00"
"""Beginning of an index of Megatron."""
LLM_C = (20240520, 1)
"""Beginning of a .bin file of llm.c, whose header is followed by 16-bit integers."""
_LLM_C_HEADER = 1024
_INDEX_HEADER = 25
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_PAIRS = 16
"""Smallest number of pairs of ids from which the size of an id is told."""
_SUFFIXES = (".bin", ".npy")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_TRAIN, _VAL = ("train",), ("val", "valid", "validation")
"""Names of the files of a folder that are a split, without their suffix."""


class TokenFile(NamedTuple):
    """File with an array of token ids, or a part of it."""

    path: Path
    dtype: str
    """NumPy's name of the type of an id."""
    offset: int
    """Number of bytes before the first id."""
    n_tokens: int

    @property
    def itemsize(self) -> int:
        """Number of bytes of an id."""
        return np.dtype(self.dtype).itemsize

    @property
    def is_wider(self) -> bool:
        """Whether the first ids look like the halves of small ids of twice the size."""
        ids = next(self.blocks(), np.empty(0, self.dtype))
        pairs = len(ids) // 2
        return pairs >= _PAIRS and not ids[1::2].any() and bool(np.count_nonzero(ids) > pairs // 2)

    def part(self, start: int, stop: int) -> TokenFile:
        """Return the tokens from ``start`` to ``stop``, exclusive."""
        start, stop = max(0, start), min(stop, self.n_tokens)
        return self._replace(offset=self.offset + start * self.itemsize, n_tokens=max(0, stop - start))

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the ids in arrays of bounded size.

        Raises:
            DataError: If the file has become shorter.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.n_tokens
            while left:
                ids = np.fromfile(file, self.dtype, min(left, BLOCK))
                if not len(ids):
                    raise DataError(f"{self.path}: has become shorter while it was read")
                left -= len(ids)
                yield ids


class TokenSplits(NamedTuple):
    """Files of each split; without validation files, the end of the training tokens is held out."""

    train: list[TokenFile]
    val: list[TokenFile]

    @property
    def paths(self) -> list[Path]:
        """Paths of all files."""
        return [file.path for file in (*self.train, *self.val)]


def token_splits(config: DataConfig) -> TokenSplits:
    """Return the files of ``data.tokens`` and ``data.validation``.

    Raises:
        DataError: If a path doesn't exist, or a file has another format.
    """
    if not config.tokens:
        raise DataError(
            "data.tokens: is empty", "specify files of token ids, for example data.tokens=train.bin"
        )
    train, val = _split_paths(config.tokens, "data.tokens")
    if config.validation:
        if val:
            raise DataError(
                f"{val[0]}: is the validation split of its folder, and data.validation names another one",
                "omit data.validation, or name the training files in data.tokens",
            )
        val = [path for paths in _split_paths(config.validation, "data.validation") for path in paths]
    if not train:
        raise DataError(
            f"{', '.join(map(str, val))}: there are only validation tokens",
            "name training files in data.tokens",
        )
    return TokenSplits(*([token_file(path, config.token_type) for path in paths] for paths in (train, val)))


def token_file(path: Path, token_type: str) -> TokenFile:
    """Return a file of token ids after checking its format.

    Args:
        path: .npy file, or .bin file, with an index of Megatron or without.
        token_type: Type of the ids of a .bin file without an index or header.

    Raises:
        DataError: If the format is unknown or damaged.
    """
    check_regular(path, "name an existing file", DataError)
    if path.suffix == ".npy":
        return _array_file(path)
    if path.with_suffix(".idx").is_file():
        return _indexed_file(path)
    size, dtype, offset = path.stat().st_size, np.dtype(token_type).newbyteorder("<").str, 0
    with path.open("rb") as file:
        header = file.read(12)
    if len(header) == 12 and struct.unpack("<2i", header[:8]) == LLM_C:
        dtype, offset = "<u2", _LLM_C_HEADER
        n_tokens = struct.unpack("<I", header[8:])[0]
        if size != offset + 2 * n_tokens:
            raise DataError(f"{path}: its header counts {n_tokens:,} tokens, and its size is {size:,} bytes")
    size -= offset
    if size % np.dtype(dtype).itemsize:
        raise DataError(
            f"{path}: {size:,} bytes are no whole number of {token_type} ids", "set data.token_type"
        )
    found = TokenFile(path, dtype, offset, size // np.dtype(dtype).itemsize)
    if found.itemsize == 2 and found.is_wider:
        raise DataError(
            f"{path}: every second {token_type} id is 0, as if its ids had 32 bits",
            "set data.token_type=uint32",
        )
    return found


def import_tokens(config: DataConfig, tokenizer: TextTokenizer, folder: Path) -> StoredCorpus:
    """Copy token ids into the shards of a folder.

    Args:
        config: Data settings.
        tokenizer: Tokenizer that the ids belong to.
        folder: Folder of the shards.

    Raises:
        DataError: If a file is damaged, or has an id outside of the vocabulary.
    """
    splits = token_splits(config)
    train, val = splits.train, splits.val
    if not val:
        total = sum(file.n_tokens for file in train)
        border = total - round(total * config.val_fraction)
        train, val = _part(train, 0, border), _part(train, border, total)
    layout, written = Layout.of(tokenizer.size), {}
    for split, files in (("train", train), ("val", val)):
        written[split] = _copy(files, tokenizer, folder, split, layout)
    report = DataReport(
        source="tokens",
        files=len(splits.paths),
        documents=sum(part.info.documents for part in written.values()),
        eos_token=tokenizer.eos_token,
        splits={split: part.info for split, part in written.items()},
    )
    shards = {name: entry for part in written.values() for name, entry in part.files.items()}
    return StoredCorpus(report, layout, shards)


def _split_paths(patterns: Sequence[str], setting: str) -> tuple[list[Path], list[Path]]:
    """Return the training and the validation files that paths and patterns name."""
    train, val = list[Path](), list[Path]()
    for pattern in patterns:
        path = Path(os.path.expanduser(pattern))
        prefix = path.with_name(f"{path.name}.bin")
        found = [path] if path.exists() else [prefix] if prefix.exists() else _matches(path)
        if not found:
            raise DataError(f"{pattern}: no such file")
        for match in found:
            if match.is_dir():
                inside = sorted(p for p in match.iterdir() if p.suffix in _SUFFIXES)
                if not inside:
                    raise DataError(f"{match}: is a folder without .bin and .npy files")
                held_out = [p for p in inside if p.stem in _VAL]
                # A folder with a file for training may have others, such as those of a test split.
                named = [p for p in inside if p.stem in _TRAIN]
                train += named or [p for p in inside if p not in held_out]
                val += held_out
            elif match.suffix in (*_SUFFIXES, ".idx"):
                train.append(match.with_suffix(".bin") if match.suffix == ".idx" else match)
            else:
                raise DataError(
                    f"{match}: unknown type of token file ({setting})",
                    "use .bin, .npy, or a .bin with its .idx",
                )
    return [*dict.fromkeys(train)], [*dict.fromkeys(val)]


def _matches(path: Path) -> list[Path]:
    return sorted(map(Path, glob.glob(str(path), recursive=True)))


def _array_file(path: Path) -> TokenFile:
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = _HEADERS.get(version, _HEADERS[2, 0])(file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python: TokenError, SyntaxError, TypeError, ...
        raise DataError(f"{path}: is no .npy file ({one_line(error)})") from None
    if dtype.kind not in "iu" or len(shape) != 1:
        raise DataError(
            f"{path}: has an array of {dtype.name} of shape {shape}",
            "save one row of integers, of shape (n,)",
        )
    if path.stat().st_size != offset + shape[0] * dtype.itemsize:
        raise DataError(f"{path}: is truncated, or has more than its {shape[0]:,} ids")
    return TokenFile(path, dtype.str, offset, shape[0])


def _indexed_file(path: Path) -> TokenFile:
    """Return the tokens of a .bin file of Megatron, whose sequences its index has to list in their order."""
    index = path.with_suffix(".idx")
    size = index.stat().st_size
    with index.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise DataError(f"{index}: is no index of Megatron", f"remove it to read {path.name} without it")
        header = file.read(_INDEX_HEADER)
        begin = file.tell()
    if len(header) < _INDEX_HEADER:
        raise DataError(f"{index}: is truncated")
    version, code, n, documents = struct.unpack("<QBQQ", header)
    if version != 1 or code not in _MEGATRON_TYPES:
        raise DataError(f"{index}: has version {version} and type {code}", "write integers in version 1")
    if size < begin + 12 * n + 8 * documents:
        raise DataError(f"{index}: is truncated")
    dtype = np.dtype(_MEGATRON_TYPES[code])
    total = 0
    lengths = TokenFile(index, "<i4", begin, n).blocks()
    starts = TokenFile(index, "<i8", begin + 4 * n, n).blocks()
    for length, start in zip(lengths, starts, strict=True):
        ends = total + np.cumsum(length, dtype=np.int64)
        if length.min() < 0 or not np.array_equal(start, (ends - length) * dtype.itemsize):
            raise DataError(f"{index}: lists sequences in another order than {path.name}", "write it again")
        total = int(ends[-1])
    if path.stat().st_size != total * dtype.itemsize:
        raise DataError(f"{path}: has another size than the {total:,} tokens of {index.name}")
    return TokenFile(path, dtype.str, 0, total)


def _part(files: Sequence[TokenFile], start: int, stop: int) -> list[TokenFile]:
    """Return the tokens of files in their order from ``start`` to ``stop``, exclusive."""
    parts = []
    for file in files:
        parts.append(file.part(start, stop))
        start, stop = start - file.n_tokens, stop - file.n_tokens
    return [part for part in parts if part.n_tokens]


def _copy(
    files: Sequence[TokenFile], tokenizer: TextTokenizer, folder: Path, split: str, layout: Layout
) -> WrittenSplit:
    """Copy a split; a document ends with an end token."""
    counts, sha256 = np.zeros(tokenizer.size, np.int64), hashlib.sha256()
    total = sum(file.n_tokens for file in files)
    with TokenWriter(folder, split, layout) as writer, progress(total=total, desc=f"copy {split}") as bar:
        writer.resume(0, [], "")
        for file in files:
            for ids in file.blocks():
                for found in (ids.min(), ids.max()):
                    if not 0 <= found < tokenizer.size:
                        raise DataError(
                            f"{file.path}: has the token id {found}, of {tokenizer.size} of the tokenizer",
                            "set data.tokenizer to the tokenizer that made it, or data.token_type",
                        )
                counts += np.bincount(ids.astype(np.int64), minlength=tokenizer.size)
                part = ids.astype("<u4")
                sha256.update(part.tobytes())
                writer.write(part)
                bar.update(len(ids))
    detokenizer = tokenizer.detokenizer
    n_bytes = sum(
        int(counts[i]) * len(detokenizer.token_bytes(i))
        for i in map(int, np.flatnonzero(counts))
        if not detokenizer.is_special(i)
    )
    documents = max(1, int(counts[tokenizer.eos_id]))
    return WrittenSplit(SplitInfo(documents, writer.n_tokens, n_bytes, sha256.hexdigest()), writer.files())
