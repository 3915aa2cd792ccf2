"""Types of text files by their names, and the files opened for reading, decompressed if necessary."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow

from tnnlm.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "Zstandard"}
"""Compressions by the end of a file's name."""


def suffix_of(path: Path) -> str:
    """Return the suffix of a file's name without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_table(path: Path) -> bool:
    """Return whether the documents of a file are its rows."""
    return suffix_of(path) in TABLE_SUFFIXES


_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Beginnings of text in UTF-16, as programs on Windows write it."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file for reading bytes, decompressed if its name ends in .gz or .zst.

    Raises:
        DataError: If a compressed file is damaged, also while it is read, or if a file has UTF-16 text.
    """
    try:
        with _reader(path) as file:
            if suffix_of(path) != ".parquet" and file.peek(2)[:2] in _UTF_16:
                raise DataError(
                    f"{path}: is UTF-16 text, not UTF-8", "convert it: iconv -f utf-16 -t utf-8 FILE > NEW"
                )
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise _damaged(path) from None
    except OSError as error:
        # Those of pyarrow have no number.
        if path.suffix == ".zst" and error.errno is None:
            raise _damaged(path) from None
        raise


def _reader(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: can't be read: is not a {COMPRESSED[path.suffix]} file, or truncated")
