"""Documents of local files: plain text, .jsonl and .parquet, each optionally compressed with gzip.

Tables are read here and not by the datasets library, which caches them by path and modification time, infers
types (a column of dates is not text) and interprets a file name as a pattern.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tnnlm.config.schema import DataConfig
from tnnlm.data.text import MARK, Tally, text_of
from tnnlm.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(config: DataConfig) -> list[Path]:
    """Return the sorted paths of the corpus' files; empty for data sets of the hub.

    Raises:
        DataError: If a pattern matches nothing, a file has an unknown type, or a column is selected where no
            file has any.
    """
    if config.source == "hub":
        return []
    files = _library_files() if config.source == "stdlib" else _given_files(config)
    if config.text_column != DataConfig.text_column and not any(map(is_table, files)):
        raise DataError(
            f"data.text_column={config.text_column}: text files have no columns",
            "omit it, or specify .jsonl or .parquet files",
        )
    return files


def is_table(path: Path) -> bool:
    """Return whether the documents of a file are its rows."""
    return _suffix(path) in TABLE_SUFFIXES


def _given_files(config: DataConfig) -> list[Path]:
    if not config.files:
        raise DataError("data.files: is empty", "specify text files, for example data.files=book.txt")
    files = []
    for pattern in config.files:
        # A file of this very name is no pattern, whatever characters its name has.
        literal = Path(pattern)
        path = literal if literal.exists() else Path(os.path.expanduser(pattern))
        found = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
        matches = sorted(p for p in found if p.exists())
        if not matches:
            raise DataError(f"{pattern}: no such file")
        files += matches if path.exists() else [p for p in matches if p.is_file()]
    for path in files:
        if path.is_dir():
            raise DataError(
                f"{path}: is a folder", f"specify its files, for example data.files='{path}/**/*.txt'"
            )
        if not path.is_file():  # a pipe without a writer would be waited for
            raise DataError(f"{path}: is not a regular file", "copy its content into one")
        if _suffix(path) not in (*TEXT_SUFFIXES, *TABLE_SUFFIXES):
            raise DataError(
                f"{path}: unknown file type", "use .txt, .md, .py, .jsonl or .parquet, optionally with .gz"
            )
    return sorted(set(files))


def read_documents(path: Path, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the documents of a file that contain text, and count them in ``tally``.

    Raises:
        DataError: If the file is binary, damaged, or a table without the text column.
    """
    suffix, normalize = _suffix(path), config.normalize_text
    if suffix in TEXT_SUFFIXES:
        cells: Iterator[str | None] = iter([_read_text(path, tally, normalize)])
    else:
        cells = (_json_cells if suffix == ".jsonl" else _parquet_cells)(path, config.text_column)
    for cell in cells:
        text = tally.keep(cell, normalize, blank=config.protocol == "fairseq" and suffix in TABLE_SUFFIXES)
        if text is not None:
            yield text


def check_column(names: list[str], column: str, where: str) -> None:
    """Check that a table has the text column.

    Raises:
        DataError: If it hasn't; the message lists the columns that it has.
    """
    if column not in names:
        raise DataError(
            f"{where}: has no column {column!r}, only {', '.join(names)}",
            "select the text column with data.text_column=...",
        )


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = (p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts[:-1]))
    files = sorted(p for p in sources if p.exists() and p.stat().st_size)
    if not files:
        raise DataError(
            f"{root}: contains no sources of the standard library", "use text files with data.source=files"
        )
    return files


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file for reading bytes, decompressed if its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: can't be read: is not a gzip file, or truncated") from None


def _read_text(path: Path, tally: Tally, normalize: bool) -> str:
    with _opened(path) as file:
        data: bytes = file.read()
    if b"\0" in data:
        raise DataError(f"{path}: is not text (zero byte at {data.index(0)})")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if path.suffix != ".py" and Path(path.stem).suffix != ".py":
            raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from None
        return _decode_source(data, tally)
    if normalize or not text.startswith(MARK):
        return text
    # The mark at the very start is a signature of the encoding, no part of the text.
    tally.normalized["byte order marks"] += 1
    return text[1:]


def _decode_source(data: bytes, tally: Tally) -> str:
    """Decode Python source that is not UTF-8 by the encoding that it declares (PEP 263), else as latin-1."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        encoding, text = "iso-8859-1", data.decode("latin-1")
    tally.encodings[encoding] += 1
    return text


def _json_cells(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text column of a file with one JSON object per line; None where it is null or missing."""
    keys: dict[str, None] = {}
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _json_object(line, column, f"{path}: can't be read: line {number}")
            if column not in keys:
                keys.update(dict.fromkeys(row))
            yield text_of(row.get(column), column, f"{path}: line {number}")
    if keys:
        check_column(list(keys), column, str(path))


def _json_object(line: bytes, column: str, where: str) -> dict[str, Any]:
    columns: list[str] = []

    def collected(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # The outermost object is the last one that is complete.
        columns[:] = [name for name, _ in pairs]
        return dict(pairs)

    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=collected)
        # JSON can escape half of a surrogate pair alone, which no encoding of text has.
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start} of the line)") from None
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object", 'write one object per line, such as {"text": "..."}')
    if columns.count(column) > 1:
        raise DataError(f"{where} has the key {column!r} {columns.count(column)} times", "keep one of them")
    return row


def _parquet_cells(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text column of a .parquet file; None where it is null."""
    with _opened(path) as file:
        # Parquet needs a seekable file.
        data: Any = pyarrow.BufferReader(file.read()) if path.suffix == ".gz" else file
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(data)
            check_column(table.schema_arrow.names, column, str(path))
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for cell in batch.column(column):
                    number += 1
                    yield text_of(cell.as_py(), column, f"{path}: row {number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: row {number}: is not UTF-8 text (byte {error.start})") from None
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # from the disk, where pyarrow's own have no number
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path}: can't be read: {reason}") from None
