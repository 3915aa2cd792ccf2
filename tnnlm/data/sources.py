"""Text sources: Python's standard library, local files, and data sets of the Hugging Face Hub.

A document is a source file, a text file, a row of a .jsonl or .parquet file, or a row of a hub data set. The
train/validation split is by document and depends only on the seed and the documents' contents.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from tnnlm.config.schema import DataConfig
from tnnlm.data.arrow_text import TEXT, DocumentIndex, index_documents, materialize_stream
from tnnlm.data.content import content_hashes, folder_content
from tnnlm.data.files import check_column, is_table, read_documents, source_files
from tnnlm.data.hub import check_hub, load_rows, readable
from tnnlm.data.report import DataReport
from tnnlm.data.split import FEW_DOCUMENTS, Corpus, hold_out, split_texts
from tnnlm.data.text import Tally, count, text_hash
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
    if config.source == "hub":
        parts += [config.hub_config, config.hub_split, config.hub_val_split, config.streaming]
        check_hub(config)
        parts += [_hub_source(config), _local_content(config)]
    else:
        files = source_files(config)
        parts += zip((path.name for path in files), content_hashes(files), strict=True)
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
        return _load_files(config, seed)
    check_hub(config)
    rows, column, found = _hub_table(config, config.hub_split, seed, scratch)
    report = DataReport(source=_hub_source(config), revision=_revision(rows), eos_token=config.eos_token)
    train = found.select(rows, column)
    if config.hub_val_split:
        held_out, val_column, val = _hub_table(config, config.hub_val_split, seed, scratch)
        hashes = _without_blank(np.concatenate([found.hashes, val.hashes]))
        shared = int(np.isin(_without_blank(val.hashes), found.hashes).sum())
        report = _with_counts(report, found.tally + val.tally, hashes, shared=shared)
        return Corpus(train, val.select(held_out, val_column), report)
    report = _with_counts(report, found.tally, found.hashes)
    if len(found.chosen) < FEW_DOCUMENTS:
        return replace(split_texts(list(train), found.hashes, config.val_fraction), report=report)
    some = hold_out(found.lengths, found.hashes, config.val_fraction)
    return Corpus(found.select(rows, column, ~some), found.select(rows, column, some), report)


def cache_folder(config: DataConfig) -> Path:
    """Return the cache folder of prepared data: ``data.cache_dir``, $TNNLM_CACHE, or ~/.cache/tnnlm.

    Raises:
        UserError: If it is a file, or doesn't exist and can't be created.
    """
    # Path.expanduser fails for an unknown user.
    folder = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else cache_root()
    check_folder(folder)
    return folder


def _load_files(config: DataConfig, seed: int) -> Corpus:
    tally, without_text, texts = Tally(), list[str](), list[str]()
    files = source_files(config)
    for path in files:
        before = len(texts)
        for text in read_documents(path, config, tally):
            texts.append(text)
            if len(texts) == config.max_documents:
                break
        if len(texts) == config.max_documents:
            break
        if len(texts) == before:
            without_text.append(path.name)
    if not any(map(str.strip, texts)):
        where = "standard library" if config.source == "stdlib" else ", ".join(config.files)
        raise DataError(f"{where}: contains no text ({_without_text(files, tally)})")
    report = DataReport(
        source=config.source, files=len(files), without_text=without_text, eos_token=config.eos_token
    )
    hashes = np.array([text_hash(seed, text) if text.strip() else b"" for text in texts], "S16")
    report = _with_counts(report, tally, _without_blank(hashes))
    return replace(split_texts(texts, hashes, config.val_fraction), report=report)


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


def _with_counts(report: DataReport, tally: Tally, hashes: Any, shared: int = 0) -> DataReport:
    return replace(
        report,
        documents=tally.documents,
        dropped=dict(tally.dropped),
        normalized=dict(tally.normalized),
        encodings=dict(tally.encodings),
        duplicates=len(hashes) - len(np.unique(hashes)),
        shared=shared,
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
    # The library caches a local folder by paths and times, so each content gets a separate cache.
    content = _local_content(config)
    if content is not None and glob.has_magic(name):
        raise DataError(
            f"data.hub_name={name}: the datasets library takes it as a pattern", "rename it without * ? ["
        )
    cache = cache_folder(config) / "datasets" / (content or "")[:32]
    rows = load_rows(config, split, cache)
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
            content=content or "",
            blank=config.protocol == "fairseq",
        )
    if not len(_without_blank(found.hashes)):
        raise DataError(f"{name}: contains no text")
    return rows, column, found if streamed is None else found._replace(tally=streamed)
