"""Rows of local tables and of data sets of the Hugging Face Hub, as dicts of plain values."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from tnnlm.config.schema import DataConfig
from tnnlm.data.content import folder_content
from tnnlm.data.files import source_files
from tnnlm.data.hub import check_hub, load_rows, readable
from tnnlm.data.sources import cache_folder
from tnnlm.errors import DataError

READ = (".jsonl", ".jsonl.gz", ".parquet", ".parquet.gz")
"""Ends of the names of files with conversations."""


class Row(NamedTuple):
    """Row of a table."""

    where: str
    """Place that error messages start with."""
    cells: dict[str, Any]
    """Values by column."""


def table_files(config: DataConfig) -> list[Path]:
    """Return the sorted paths of the tables; empty for data sets of the hub.

    Raises:
        DataError: If a pattern matches nothing, or a file isn't a table.
    """
    files = source_files(config)
    for path in files:
        if not path.name.endswith(READ):
            raise DataError(
                f"{path}: is no .jsonl or .parquet file, which data.format={config.format} reads",
                "give one, also as .gz, or omit data.format for text",
            )
    return files


def read_rows(config: DataConfig, held_out: bool = False) -> Iterator[Row]:
    """Yield the rows of the data set.

    Args:
        config: Data settings.
        held_out: Read ``data.hub_val_split`` instead of ``data.hub_split``.

    Raises:
        DataError: If a file or data set can't be read.
    """
    if config.source == "hub":
        yield from _hub_rows(config, str(config.hub_val_split) if held_out else config.hub_split)
        return
    for path in table_files(config):
        try:
            yield from _parquet_rows(path) if ".parquet" in path.suffixes else _json_rows(path)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise DataError(f"{path}: can't be read: is not a gzip file, or truncated") from None


def _hub_rows(config: DataConfig, split: str) -> Iterator[Row]:
    name = check_hub(config)
    # The library caches a local folder by paths and times, so each content gets a separate cache.
    content = (
        hashlib.sha256(repr(folder_content(Path(name))).encode()).hexdigest() if Path(name).is_dir() else ""
    )
    rows = load_rows(config, split, cache_folder(config) / "datasets" / content[:32])
    with readable(name):
        for number, cells in enumerate(rows, 1):
            yield Row(f"{name}: row {number} of {split}", cells)


def _json_rows(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}: line {number}"
                yield Row(where, _json_object(line, where))


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        cells = json.loads(line.decode("utf-8-sig"))
        # JSON can escape half of a surrogate pair alone, which no encoding of text has.
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(cells, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start} of the line)") from None
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(cells, dict):
        raise DataError(f"{where} is not a JSON object", "write one object per line")
    return cells


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # Parquet needs a seekable file.
            source: Any = pyarrow.BufferReader(file.read()) if path.suffix == ".gz" else str(path)
        table = pyarrow.parquet.ParquetFile(source)
        for batch in table.iter_batches(batch_size=1024):
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", cells)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {number + 1}: is not UTF-8 text (byte {error.start})") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the disk, where pyarrow's own have no number
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: can't be read: {reason}") from None
