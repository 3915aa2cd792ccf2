"""Data sets of the Hugging Face Hub, and local folders in their format, which may refer to no other file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FILE_TYPES

from tnnlm.checksums import list_files, write_signed
from tnnlm.config.schema import DataConfig
from tnnlm.config.values import one_line
from tnnlm.data.prepared import read_entries, verify_files
from tnnlm.errors import OS_ADVICE, DataError


def check_hub(config: DataConfig) -> str:
    """Return the name of the data set or folder, after the checks that need no data.

    Raises:
        DataError: If there is no name, it is that of a file type, or both splits are the same.
    """
    name, held_out = config.hub_name, config.hub_val_split
    if not name:
        raise DataError(
            "data.hub_name: is empty", "specify a data set, for example data.hub_name=Salesforce/wikitext"
        )
    if name in FILE_TYPES and not Path(name).is_dir():
        # The library would read whatever files of this type are in the working directory.
        raise DataError(
            f"data.hub_name={name}: is a file type of the datasets library and no data set",
            "specify a data set, or files with data.source=files",
        )
    if held_out is not None and _whole(held_out) == _whole(config.hub_split):
        raise DataError(
            f"data.hub_val_split={held_out}: is the split to train on",
            "set another split, or null to hold out a part of it",
        )
    if config.streaming and config.max_documents is None:
        raise DataError(
            "data.streaming=true: a stream of unknown length can't be split", "set data.max_documents"
        )
    return name


def load_rows(config: DataConfig, split: str, cache: Path) -> Any:
    """Return a split as the datasets library loads it, a stream if ``config.streaming``.

    Raises:
        DataError: If the library can't read it, a local folder refers to a file outside, or a table in
            ``cache`` has changed since it was first read.
    """
    # The library logs each error that it raises a second time, and shows progress bars without a terminal.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name = str(config.hub_name)
    options: dict[str, Any] = {"name": config.hub_config, "cache_dir": str(cache)}
    with readable(name):
        path = name
        if Path(name).is_dir():
            path = os.path.join(".", name)  # otherwise a folder called json is taken for the file type
            _check_files(datasets.load_dataset_builder(path, **options).config.data_files, Path(name), name)
        rows = datasets.load_dataset(path, split=split, streaming=config.streaming, **options)
    if not config.streaming:
        _check_tables(rows)
    return rows


def _check_tables(rows: datasets.Dataset) -> None:
    """Verify the tables in the library's cache by checksums, which are recorded when they are first read.

    The library verifies what it downloads, but not the tables that it makes of it and maps into memory. A
    table that it makes again is in a new folder, without records.

    Raises:
        DataError: If a table has changed.
    """
    folders: dict[Path, dict[str, Any]] = {}
    for path in sorted({Path(entry["filename"]) for entry in rows.cache_files}):
        record = path.with_name(f"{path.name}.checksum.json")
        if os.path.lexists(record):
            folders.setdefault(path.parent, {}).update(read_entries(record)["checksums"])
        else:
            write_signed(record, {"checksums": list_files(path.parent, [path.name])})
    for folder, files in folders.items():
        verify_files(folder, files)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Convert any error of the datasets library, which raises many types, to a ``DataError``."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        cause = cause or error
        if isinstance(cause, OSError) and cause.errno in OS_ADVICE:
            raise cause from None
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise DataError(f"{what}: can't be read: {reason}") from None


def _whole(split: str) -> str:
    """Return the name of a split without blanks and without a slice that contains all of it."""
    return re.sub(r"\[(?:0%?)?:(?:100%)?\]$", "", re.sub(r"\s", "", split))


def _check_files(files: Any, folder: Path, name: str) -> None:
    """Check that all files are inside a folder: a stranger's folder must not publish other files.

    Snapshots in the cache of the hub are links to its folder of blobs, which belongs to them.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    for path in (path for paths in (files or {}).values() for path in paths):
        local = Path(str(path))
        if "://" in str(path) or not any(local.resolve().is_relative_to(place) for place in inside):
            raise DataError(
                f"{name}: refers to {one_line(path)}, outside of the folder", "copy the file into the folder"
            )
