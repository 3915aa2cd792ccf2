"""Rows of .jsonl, .json, .csv and .parquet files, read one after another.

They are read here and not by the datasets library, which caches them by path and modification time, infers
types (a column of dates is not text) and interprets a file name as a pattern.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tnnlm.data.file_types import opened, suffix_of
from tnnlm.data.text import listed, text_of
from tnnlm.errors import DataError

LONGEST_CELL = 1 << 30
"""Largest number of characters of a cell of a .csv file, and of an item of an array."""
_BLOCK = 1 << 20
"""Characters of an array that are read at a time."""
_LONGEST_WORD = 16
"""Characters at the end of an incomplete text within which its fault is found, such as a part of a number."""
_ITEM = re.compile(r"\s*(\S)\s*(\S)?")


def cells_of(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text column of a table; None where it is null or missing.

    Raises:
        DataError: If the file is damaged, has no such column, or has something other than text in it.
    """
    return _READERS[suffix_of(path)](path, column)


def check_column(names: list[str], column: str, where: str) -> None:
    """Check that a table has the text column.

    Raises:
        DataError: If it hasn't; the message lists the columns that it has.
    """
    if column not in names:
        raise DataError(
            f"{where}: has no column {column!r}, only {listed(names)}",
            "select the text column with data.text_column=...",
        )


def json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a .jsonl file, or of a .json file, which may be an array, and their places.

    Args:
        path: File.
        columns: Keys that an object may have once only.

    Raises:
        DataError: If the file is damaged, or has something other than objects.
    """
    with opened(path) as file:
        if suffix_of(path) == ".json":
            beginning = file.peek(1).lstrip()
            if beginning.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
                    yield from _rows_of_array(text, columns, path)
                return
        yield from _rows_of_lines(file, columns, path)


def _rows_of_lines(lines: Any, columns: Sequence[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: can't be read: line {number}"
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 text (byte {error.start} of the line)") from None
        row, _ = _json_object(text, columns, where)
        yield f"{path}: line {number}", row


def _json_cells(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text column of a .jsonl or .json file."""
    keys: dict[str, None] = {}
    for where, row in json_rows(path, (column,)):
        if column not in keys:
            keys.update(dict.fromkeys(row))
        yield text_of(row.get(column), column, where)
    if keys:
        check_column(list(keys), column, str(path))


def _rows_of_array(
    file: io.TextIOWrapper, columns: Sequence[str], path: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of an array, of which some are in memory at a time."""
    number, text, start, size = 0, "", 0, _BLOCK
    try:
        while True:
            where = f"{path}: can't be read: item {number + 1}"
            # The bracket or comma before an item is read with it.
            begin = _ITEM.match(text, start)
            row, end = None, 0
            if begin and begin[1] == "]" and number:
                if (text[begin.end(1) :] + file.read(_BLOCK)).strip():
                    raise DataError(f"{path}: can't be read: has text after the end of the array")
                break
            if begin and begin[2]:
                if begin[1] != ("," if number else "["):
                    raise DataError(f"{where} is not JSON (expected a comma or the end of the array)")
                if begin[2] == "]" and not number:
                    break
                row, end = _next_object(text, begin.start(2), columns, where)
            if row is not None:
                number, start, size = number + 1, end, _BLOCK
                yield f"{path}: item {number}", row
                continue
            more = file.read(size) if size <= LONGEST_CELL else ""
            if not more:
                raise DataError(f"{where} is not JSON, or the file is truncated")
            size *= 2  # An item may be large, and its beginning is parsed again.
            text, start = text[start:] + more, 0
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text (after item {number})") from None


def _next_object(
    text: str, start: int, columns: Sequence[str], where: str
) -> tuple[dict[str, Any] | None, int]:
    """Return the object at a place of a text, and its end; None if it may be incomplete."""
    try:
        return _json_object(text, columns, where, start)
    except json.JSONDecodeError as error:
        # More text can complete a string, which may begin anywhere, or a word at the end.
        if error.msg.startswith("Unterminated") or error.pos > len(text) - _LONGEST_WORD:
            return None, 0
        raise DataError(
            f"{where} is not JSON ({error.msg} at character {error.pos - start + 1} of it)"
        ) from None


def _json_object(
    text: str, columns: Sequence[str], where: str, start: int | None = None
) -> tuple[dict[str, Any], int]:
    """Return the JSON object that a text is, or that begins at ``start`` and more follows, and its end.

    Raises:
        DataError: If it isn't a JSON object, or one of ``columns`` occurs more than once.
        json.JSONDecodeError: If no JSON begins at ``start``.
    """
    found: list[str] = []

    def collected(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # The outermost object is the last one that is complete.
        found[:] = [name for name, _ in pairs]
        return dict(pairs)

    decoder = json.JSONDecoder(object_pairs_hook=collected)
    try:
        if start is None:
            row, end = decoder.decode(text), len(text)
        else:
            row, end = decoder.raw_decode(text, start)
        # JSON can escape half of a surrogate pair alone, which no encoding of text has.
        if any(text.find(mark, start or 0, end) >= 0 for mark in ("\\ud", "\\uD")):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError) as error:
        if start is not None and isinstance(error, json.JSONDecodeError):
            raise
        raise DataError(f"{where} is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is not a JSON object", f'write one object per line, such as {{"{columns[0]}": ...}}'
        )
    for column in columns:
        if found.count(column) > 1:
            raise DataError(f"{where} has the key {column!r} {found.count(column)} times", "keep one of them")
    return row, end


def _csv_cells(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text column of a .csv file with a line of column names."""
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        limit = csv.field_size_limit(LONGEST_CELL)
        rows = csv.reader(text, strict=True)
        try:
            names = next(rows, [])
            if names:
                check_column(names, column, str(path))
            if names.count(column) > 1:
                raise DataError(f"{path}: has {names.count(column)} columns {column!r}", "rename one of them")
            for row in rows:
                if row and len(row) != len(names):
                    found = f"line {rows.line_num} has {len(row)} cells instead of {len(names)}"
                    raise DataError(f"{path}: can't be read: {found}", "quote cells that contain commas")
                if row:
                    yield row[names.index(column)]
        except UnicodeDecodeError:
            raise DataError(f"{path}: is not UTF-8 text (after line {rows.line_num})") from None
        except csv.Error as error:
            raise DataError(f"{path}: can't be read: line {rows.line_num}: {error}") from None
        finally:
            csv.field_size_limit(limit)


def _parquet_cells(path: Path, column: str) -> Iterator[str | None]:
    """Yield the text column of a .parquet file; None where it is null."""
    for where, row in parquet_rows(path, (column,), lambda names: check_column(names, column, str(path))):
        yield text_of(row[column], column, where)


def parquet_rows(
    path: Path, columns: Sequence[str], check: Callable[[list[str]], None] = lambda names: None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a .parquet file, and their places.

    Args:
        path: File.
        columns: Columns that are read; if one is missing, all are.
        check: Function that is called first, with the names of all columns.

    Raises:
        DataError: If the file is damaged.
    """
    with opened(path) as file:
        # Parquet needs a seekable file.
        data: Any = file if path.suffix == ".parquet" else pyarrow.BufferReader(file.read())
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(data)
            check(table.schema_arrow.names)
            known = set(columns) <= set(table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=[*columns] if known else None):
                names = batch.schema.names
                # A name that occurs twice is a KeyError.
                for cells in zip(*map(batch.column, names), strict=True):
                    number += 1
                    row = {name: cell.as_py() for name, cell in zip(names, cells, strict=True)}
                    yield f"{path}: row {number}", row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: row {number}: is not UTF-8 text (byte {error.start})") from None
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # from the disk, where pyarrow's own have no number
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path}: can't be read: {reason}") from None


_READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".jsonl": _json_cells,
    ".json": _json_cells,
    ".csv": _csv_cells,
    ".parquet": _parquet_cells,
}
