"""Text sources: Python's standard library, local files, and data sets of the Hugging Face Hub.

A document is a source file, a text file, a row of a .jsonl or .parquet file, or a row of a hub data set. The
train/validation split is by document and depends only on the seed and the documents' contents.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import os
import shutil
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from tnnlm.config.schema import DataConfig
from tnnlm.data.arrow_text import TEXT, DocumentIndex, index_documents, materialize_stream, text_of
from tnnlm.data.split import FEW_DOCUMENTS, Corpus, hold_out, split_texts
from tnnlm.errors import OS_ADVICE, DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(config: DataConfig) -> list[Path]:
    """Return the sorted paths of the corpus' files; empty for data sets of the hub.

    Raises:
        DataError: If a pattern matches nothing or a file has an unknown type.
    """
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        sources = (
            p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts[:-1])
        )
        files = sorted(p for p in sources if p.exists() and p.stat().st_size)
        if not files:
            raise DataError(
                f"{root}: contains no sources of the standard library",
                "use text files with data.source=files",
            )
        return files
    if config.source == "hub":
        return []
    if not config.files:
        raise DataError("data.files: is empty", "specify text files, for example data.files=book.txt")
    files = []
    for pattern in config.files:
        path = Path(pattern).expanduser()
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
        if _suffix(path) not in (*TEXT_SUFFIXES, *TABLE_BUILDERS):
            raise DataError(
                f"{path}: unknown file type", "use .txt, .md, .py, .jsonl or .parquet, optionally with .gz"
            )
    return sorted(set(files))


def source_fingerprint(config: DataConfig) -> str:
    """Return a hash of the text source.

    It covers the paths, sizes and modification times of files, or the name and splits of a hub data set.
    """
    parts: list[Any] = [config.source, config.text_column, config.max_documents]
    folder = Path(config.hub_name or "")
    local = config.source == "hub" and bool(config.hub_name) and folder.is_dir()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if local else source_files(config):
        status = path.stat()
        parts.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    if config.source == "hub":
        parts += [
            config.hub_name,
            config.hub_config,
            config.hub_split,
            config.hub_val_split,
            config.streaming,
        ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_corpus(config: DataConfig, seed: int, scratch: Path) -> Corpus:
    """Load the documents and split them into training and validation data.

    Documents of a hub data set stay on disk; those of other sources are loaded into memory.

    Args:
        config: Data settings.
        seed: Seed of the train/validation split.
        scratch: Folder for intermediate files of a hub data set, from which a killed preparation resumes.

    Raises:
        DataError: If the input is missing, empty, binary or damaged.
    """
    if config.source != "hub":
        documents = (text for text in _documents(config) if text.strip())
        texts = list(itertools.islice(documents, config.max_documents))
        if not texts:
            where = "standard library" if config.source == "stdlib" else ", ".join(config.files)
            raise DataError(f"{where}: contains no text")
        return split_texts(texts, config.val_fraction, seed)
    rows, column, found = _hub_table(config, config.hub_split, seed, scratch)
    if config.hub_val_split:
        held_out, val_column, val = _hub_table(config, config.hub_val_split, seed, scratch)
        return Corpus(found.select(rows, column), val.select(held_out, val_column))
    if len(found.chosen) < FEW_DOCUMENTS:
        return split_texts(list(found.select(rows, column)), config.val_fraction, seed)
    some = hold_out(found.lengths, found.hashes, config.val_fraction)
    return Corpus(found.select(rows, column, ~some), found.select(rows, column, some))


def cache_folder(config: DataConfig) -> Path:
    """Return the cache folder of prepared data: ``data.cache_dir``, $TNNLM_CACHE, or ~/.cache/tnnlm."""
    return Path(config.cache_dir or os.environ.get("TNNLM_CACHE") or "~/.cache/tnnlm").expanduser()


def _documents(config: DataConfig) -> Iterator[str]:
    for path in source_files(config):
        suffix = _suffix(path)
        if suffix in TEXT_SUFFIXES:
            yield _read_text(path)
        else:
            yield from _rows(_load_table(path, suffix, config), config, str(path))


def _load_table(path: Path, suffix: str, config: DataConfig) -> Any:
    if path.suffix == ".gz" and suffix == ".parquet":
        # The library decompresses text on the fly, but parquet needs a seekable file.
        with tempfile.TemporaryDirectory() as folder, _readable(str(path)):
            plain = Path(folder) / path.stem
            with gzip.open(path) as packed, plain.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            return datasets.Dataset.from_parquet(str(plain), cache_dir=folder, keep_in_memory=True)
    return _load(
        str(path),
        TABLE_BUILDERS[suffix],
        data_files=glob.escape(str(path)),
        split="train",
        cache_dir=str(cache_folder(config) / "datasets"),
    )


def _hub_table(
    config: DataConfig, split: str, seed: int, scratch: Path
) -> tuple[datasets.Dataset, str, DocumentIndex]:
    """Return a split of a hub data set on disk, its text column, and the index of its rows with text."""
    if not config.hub_name:
        raise DataError(
            "data.hub_name: is empty", "specify a data set, for example data.hub_name=Salesforce/wikitext"
        )
    if config.streaming and config.max_documents is None:
        raise DataError(
            "data.streaming=true: a stream of unknown length can't be split", "set data.max_documents"
        )
    name, column = config.hub_name, config.text_column
    rows = _load(
        name,
        name,
        name=config.hub_config,
        split=split,
        streaming=config.streaming,
        cache_dir=str(cache_folder(config) / "datasets"),
    )
    _check_column(rows, config, name)
    limit = config.max_documents
    if config.streaming:
        assert limit is not None
        with _readable(name):
            rows = materialize_stream(rows, column, name, limit=limit, folder=scratch, name=split)
        column = TEXT
    with _readable(name):
        kept = scratch / f"{split}.survey.npz"
        found = index_documents(rows, column, name, seed=seed, limit=limit, kept=kept)
    if not len(found.chosen):
        raise DataError(f"{name}: contains no text")
    return rows, column, found


def _load(what: str, builder: str, **options: Any) -> Any:
    # The library logs each error that it raises a second time, and shows progress bars without a terminal.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _readable(what):
        return datasets.load_dataset(builder, **options)


@contextmanager
def _readable(what: str) -> Iterator[None]:
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


def _check_column(rows: Any, config: DataConfig, where: str) -> None:
    if rows.column_names is not None and config.text_column not in rows.column_names:
        raise DataError(
            f"{where}: has no column {config.text_column!r}, only {', '.join(rows.column_names)}",
            "select the text column with data.text_column=...",
        )


def _rows(rows: Any, config: DataConfig, where: str) -> Iterator[str]:
    _check_column(rows, config, where)
    with _readable(where):
        for index, row in enumerate(rows):
            yield text_of(row.get(config.text_column), config.text_column, f"{where}: row {index + 1}")


def _read_text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if b"\0" in data:
            raise DataError(f"{path}: is not text (zero byte at {data.index(0)})")
        return data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: is not a gzip file, or truncated") from None
    except UnicodeDecodeError as error:
        if path.suffix == ".py":  # Python sources may declare another encoding; such files are rare and small
            return data.decode("latin-1")
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
