"""Local files that text is read from, and their documents, which are written to one file."""

from __future__ import annotations

import glob
import os
import sysconfig
from pathlib import Path

from tnnlm.config.schema import DataConfig
from tnnlm.data.file_types import TABLE_SUFFIXES, TEXT_SUFFIXES, is_table, suffix_of
from tnnlm.data.plain_text import split_documents, text_pieces
from tnnlm.data.stored_texts import TextWriter
from tnnlm.data.tables import cells_of
from tnnlm.data.text import BLANK, Tally
from tnnlm.errors import DataError

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
            "omit it, or specify .jsonl, .json, .csv or .parquet files",
        )
    return files


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
        if suffix_of(path) not in (*TEXT_SUFFIXES, *TABLE_SUFFIXES):
            raise DataError(
                f"{path}: unknown file type",
                f"use {', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))}, optionally with .gz or .zst",
            )
    return sorted(set(files))


def write_documents(path: Path, config: DataConfig, tally: Tally, writer: TextWriter) -> None:
    """Write the documents of a file that contain text, up to ``data.max_documents`` of all files.

    Args:
        path: File.
        config: Data settings.
        tally: Counts of the documents, which are added to.
        writer: Writer of the documents.

    Raises:
        DataError: If the file is binary, damaged, or a table without the text column.
    """
    limit, before = config.max_documents, len(writer)
    if is_table(path):
        for cell in cells_of(path, config.text_column):
            text = tally.keep(cell, config.normalize_text, blank=config.protocol == "fairseq")
            if text is not None:
                writer.add([text], blank=True)
                if len(writer) == limit:
                    return
        return
    changes = Tally()
    pieces = text_pieces(path, changes, config.normalize_text)
    separator = unescaped(config.document_separator) if config.document_separator else ""
    for document in split_documents(pieces, separator) if separator else (pieces,):
        if writer.add(document):
            tally.documents += 1
            if len(writer) == limit:
                break
        elif not separator:
            tally.dropped[BLANK] += 1
    if len(writer) > before:
        tally.normalized += changes.normalized
        tally.encodings += changes.encodings


def unescaped(separator: str) -> str:
    r"""Return a separator of documents in which ``\n`` and ``\t`` are a line end and a tab."""
    return separator.replace("\\n", "\n").replace("\\t", "\t")


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = (p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts[:-1]))
    files = sorted(p for p in sources if p.exists() and p.stat().st_size)
    if not files:
        raise DataError(
            f"{root}: contains no sources of the standard library", "use text files with data.source=files"
        )
    return files
