"""Rows of local tables and of data sets of the Hugging Face Hub, as dicts of plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tnnlm.config.schema import DataConfig
from tnnlm.data.file_types import suffix_of
from tnnlm.data.files import source_files
from tnnlm.data.hub import check_hub, readable
from tnnlm.data.sources import held_out_files, hub_rows
from tnnlm.data.tables import json_rows, parquet_rows
from tnnlm.errors import DataError

READ = (".jsonl", ".json", ".parquet")
"""Types of files with conversations."""


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
        if suffix_of(path) not in READ:
            raise DataError(
                f"{path}: is no .jsonl, .json or .parquet file, which data.format={config.format} reads",
                "give one, also as .gz or .zst, or omit data.format for text",
            )
    return files


def read_rows(config: DataConfig, columns: Sequence[str], held_out: bool = False) -> Iterator[Row]:
    """Yield the rows of the data set.

    Args:
        config: Data settings.
        columns: Columns that are used.
        held_out: Read ``data.validation``, or ``data.hub_val_split``, instead of the other rows.

    Raises:
        DataError: If a file or data set can't be read.
    """
    if held_out and config.validation:
        config = held_out_files(config)
    if config.source == "hub":
        yield from _hub_rows(config, str(config.hub_val_split) if held_out else config.hub_split)
        return
    for path in table_files(config):
        rows = parquet_rows if suffix_of(path) == ".parquet" else json_rows
        yield from (Row(*found) for found in rows(path, columns))


def _hub_rows(config: DataConfig, split: str) -> Iterator[Row]:
    name = check_hub(config)
    rows, _ = hub_rows(config, split)
    with readable(name):
        for number, cells in enumerate(rows, 1):
            yield Row(f"{name}: row {number} of {split}", cells)
