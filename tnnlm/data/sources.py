"""Text sources: Python's standard library, local files, and data sets of the Hugging Face Hub.

A document is a source file, a text file or a part of one between separators, or a row of a table or of a hub
data set. The train/validation split is by document and depends only on the seed and the documents' contents.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from numpy.typing import NDArray

from tnnlm.config.schema import DataConfig
from tnnlm.data.arrow_text import TEXT, DocumentIndex, index_documents, materialize_stream
from tnnlm.data.content import content_hashes, folder_content
from tnnlm.data.document_file import StoredDocuments, stored_documents
from tnnlm.data.file_types import is_table
from tnnlm.data.files import source_files, write_documents
from tnnlm.data.hub import check_hub, load_rows, readable
from tnnlm.data.progress import progress
from tnnlm.data.report import DataReport
from tnnlm.data.split import FEW_DOCUMENTS, Corpus, hold_out, split_stored, split_texts
from tnnlm.data.stored_texts import TextWriter
from tnnlm.data.tables import check_column
from tnnlm.data.text import Tally, count
from tnnlm.data.token_sources import token_splits
from tnnlm.errors import DataError
from tnnlm.files import cache_root, check_folder


def source_fingerprint(config: DataConfig) -> str:
    """Return a hash of the text source, for the key of the prepared data.

    Of local files, a local folder with a data set, and the standard library it covers names (without the
    folder) and content, read on every call. A data set of the hub is not looked up again: the hash covers its
    name, configuration and splits, so that training needs no network, and prepared data stays unchanged when
    the authors change the data set. The report has the commit that was read.
    """
    parts: list[Any] = [config.source, config.text_column, config.max_documents, config.normalize_text]
    if config.document_separator is not None:
        parts.append(("separator", config.document_separator))
    if config.source == "hub":
        parts += [config.hub_config, config.hub_split, config.hub_val_split, config.streaming]
        check_hub(config)
        parts += [_hub_source(config), _local_content(config)]
    elif config.source == "tokens":
        splits = token_splits(config)
        parts += [config.token_type, len(splits.val)]
        parts += zip((path.name for path in splits.paths), content_hashes(splits.paths), strict=True)
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    else:
        files = source_files(config)
        parts += zip((path.name for path in files), content_hashes(files), strict=True)
    if config.validation:
        parts.append(("validation", source_fingerprint(held_out_files(config))))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_corpus(config: DataConfig, seed: int, scratch: Path) -> Corpus:
    """Load the documents and split them into training and validation data.

    Documents stay on disk.

    Args:
        config: Data settings.
        seed: Seed of the train/validation split.
        scratch: Folder for intermediate files, from which a killed preparation resumes.

    Raises:
        DataError: If the input is missing, empty, binary or damaged.
    """
    if config.source == "hub":
        check_hub(config)
    corpus, hashes, tally = (_load_hub if config.source == "hub" else _load_files)(config, seed, scratch)
    if config.validation:
        files, found, more, without_text = _load_stored(held_out_files(config), seed, scratch, "validation")
        # The rest of the corpus is all training text.
        shared = int(np.isin(_without_blank(found.hashes), hashes).sum())
        report = replace(corpus.report, files=corpus.report.files + files, shared=shared)
        report.without_text.extend(without_text)
        corpus = Corpus(corpus.train, found.texts(), report)
        hashes, tally = np.concatenate([hashes, found.hashes]), tally + more
    return replace(corpus, report=_with_counts(corpus.report, tally, _without_blank(hashes)))


def held_out_files(config: DataConfig) -> DataConfig:
    """Return the settings that read ``data.validation`` as the files of a corpus."""
    return replace(config, source="files", files=config.validation, validation=[])


def cache_folder(config: DataConfig) -> Path:
    """Return the cache folder of prepared data: ``data.cache_dir``, $TNNLM_CACHE, or ~/.cache/tnnlm.

    Raises:
        UserError: If it is a file, or doesn't exist and can't be created.
    """
    # Path.expanduser fails for an unknown user.
    folder = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else cache_root()
    check_folder(folder)
    return folder


def hub_rows(config: DataConfig, split: str) -> tuple[Any, str]:
    """Return a split of a data set by name, or of a local folder, and the hash of the folder, else ''.

    Raises:
        DataError: If the datasets library can't read it, or takes the name of the folder as a pattern.
    """
    name, content = str(config.hub_name), _local_content(config) or ""
    if content and glob.has_magic(name):
        raise DataError(
            f"data.hub_name={name}: the datasets library takes it as a pattern", "rename it without * ? ["
        )
    # The library caches a local folder by paths and times, so each content gets a separate cache.
    return load_rows(config, split, cache_folder(config) / "datasets" / content[:32]), content


_Loaded: TypeAlias = tuple[Corpus, NDArray[np.bytes_], Tally]
"""Corpus, the hashes of its documents, and their counts."""


def _load_hub(config: DataConfig, seed: int, scratch: Path) -> _Loaded:
    rows, column, found = _hub_table(config, config.hub_split, seed, scratch)
    report = DataReport(source=_hub_source(config), revision=_revision(rows), eos_token=config.eos_token)
    train = found.select(rows, column)
    if config.validation:
        return Corpus(train, [], report), found.hashes, found.tally
    if config.hub_val_split:
        held_out, val_column, val = _hub_table(config, config.hub_val_split, seed, scratch)
        hashes = np.concatenate([found.hashes, val.hashes])
        report = replace(report, shared=int(np.isin(_without_blank(val.hashes), found.hashes).sum()))
        return Corpus(train, val.select(held_out, val_column), report), hashes, found.tally + val.tally
    if len(found.chosen) < FEW_DOCUMENTS:
        corpus = split_texts(list(train), found.hashes, config.val_fraction)
        return replace(corpus, report=report), found.hashes, found.tally
    some = hold_out(found.lengths, found.hashes, config.val_fraction)
    corpus = Corpus(found.select(rows, column, ~some), found.select(rows, column, some), report)
    return corpus, found.hashes, found.tally


def _load_files(config: DataConfig, seed: int, scratch: Path) -> _Loaded:
    files, found, tally, without_text = _load_stored(config, seed, scratch, "files")
    report = DataReport(
        source=config.source, files=files, without_text=without_text, eos_token=config.eos_token
    )
    corpus = Corpus(found.texts(), []) if config.validation else split_stored(found, config.val_fraction)
    return replace(corpus, report=report), found.hashes, tally


def _load_stored(
    config: DataConfig, seed: int, scratch: Path, name: str
) -> tuple[int, StoredDocuments, Tally, list[str]]:
    """Write the documents of local files to one file in ``scratch``, unless an earlier attempt did.

    Returns:
        Number of files, their documents and the counts of these, and the names of files without any.
    """
    files = source_files(config)
    key = f"{source_fingerprint(config)} {seed} {config.protocol}"
    found = stored_documents(scratch, key, name, seed, lambda writer: _write_files(files, config, writer))
    return len(files), found, Tally.from_dict(found.entries["tally"]), found.entries["without_text"]


def _write_files(files: list[Path], config: DataConfig, writer: TextWriter) -> dict[str, Any]:
    tally, without_text = Tally(), list[str]()
    for path in progress(files, desc="read files", unit="file"):
        before = len(writer)
        write_documents(path, config, tally, writer)
        if len(writer) == config.max_documents:
            break
        if len(writer) == before:
            without_text.append(path.name)
    if not writer.has_text:
        where = "standard library" if config.source == "stdlib" else ", ".join(config.files)
        raise DataError(f"{where}: contains no text ({_without_text(files, tally)})")
    return {"tally": tally.to_dict(), "without_text": without_text}


def _without_blank(hashes: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """Return the hashes of documents that aren't blank lines, which are alike in every text."""
    return hashes[hashes != b""]


def _without_text(files: list[Path], tally: Tally) -> str:
    """Return why files contain no text: no bytes, or only null and blank rows or documents."""
    if not any(path.stat().st_size for path in files):
        return "it is empty" if len(files) == 1 else "they are empty"
    unit = "row" if any(map(is_table, files)) else "document"
    counts = [count(number, f"{kind} {unit}") for kind, number in tally.dropped.items()]
    return ", ".join(counts) or f"no {unit}s"


def _with_counts(report: DataReport, tally: Tally, hashes: Any) -> DataReport:
    return replace(
        report,
        documents=tally.documents,
        dropped=dict(tally.dropped),
        normalized=dict(tally.normalized),
        encodings=dict(tally.encodings),
        duplicates=len(hashes) - len(np.unique(hashes)),
    )


def _local_content(config: DataConfig) -> str | None:
    """Return the hash of a local folder that is read as a hub data set; None for one of the hub itself."""
    folder = Path(config.hub_name or "")
    if not config.hub_name or not folder.is_dir():
        return None
    return hashlib.sha256(repr(folder_content(folder)).encode()).hexdigest()


def _hub_source(config: DataConfig) -> str:
    """Return the name of the data set on the hub, or of a local folder without its parents."""
    local = config.hub_name is not None and Path(config.hub_name).is_dir()
    return Path(config.hub_name or "").resolve().name if local else str(config.hub_name)


def _revision(rows: datasets.Dataset) -> str:
    """Return the commit of a hub data set, which the datasets library names its folder after, else ''."""
    names = [Path(file["filename"]).parent.name for file in rows.cache_files]
    return next((name for name in names if re.fullmatch("[0-9a-f]{40}", name)), "")


def _hub_table(
    config: DataConfig, split: str, seed: int, scratch: Path
) -> tuple[datasets.Dataset, str, DocumentIndex]:
    """Return a split of a hub data set on disk, its text column, and the index of its rows with text."""
    name, column, limit = str(config.hub_name), config.text_column, config.max_documents
    rows, content = hub_rows(config, split)
    if rows.column_names is not None:
        check_column(rows.column_names, column, name)
    normalize, streamed = config.normalize_text, None
    with readable(name):
        if config.streaming:
            assert limit is not None
            rows, streamed = materialize_stream(
                rows,
                column,
                name,
                limit=limit,
                folder=scratch,
                name=split,
                normalize=normalize,
                blank=config.protocol == "fairseq",
            )
            column, normalize = TEXT, False
        found = index_documents(
            rows,
            column,
            name,
            seed=seed,
            limit=limit,
            kept=scratch / f"{split}.survey.npz",
            normalize=normalize,
            content=content,
            blank=config.protocol == "fairseq",
        )
    if not len(_without_blank(found.hashes)):
        raise DataError(f"{name}: contains no text")
    return rows, column, found if streamed is None else found._replace(tally=streamed)
