"""Preparation of labelled sequences: generated or read once, then loaded from the cache."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from tnnlm.config.schema import Config
from tnnlm.data.content import content_hashes, folder_content
from tnnlm.data.prepared import is_prepared
from tnnlm.data.progress import progress
from tnnlm.data.report import DataReport
from tnnlm.data.sequences.listops import generate
from tnnlm.data.sequences.lra import needed, splits
from tnnlm.data.sequences.rows import (
    SEQUENCE_TASKS,
    SPLITS,
    Example,
    LabelledCorpus,
    read_corpus,
    write_corpus,
)
from tnnlm.data.sources import cache_folder
from tnnlm.data.waiting import prepare_once
from tnnlm.errors import ConfigError
from tnnlm.files import atomic_folder, remove_leftovers

VERSION = 3
"""Version in the cache key; increment it whenever the rows or their files change."""
_WHOLE = ("image", "pathfinder", "pathx")


def task_name(config: Config) -> str:
    """Return the name in ``SEQUENCE_TASKS`` of the configured classification task."""
    return "listops" if config.data.source == "listops" else config.data.lra.task


def check_sequence_model(config: Config) -> None:
    """Check that the model fits the classification task, without looking for its files.

    Raises:
        ConfigError: If it doesn't.
    """
    name, model = task_name(config), config.model
    task = SEQUENCE_TASKS[name]
    for key, value in (("n_classes", task.n_classes), ("pair", task.parts == 2)):
        if getattr(model, key) != value:
            set_to = str(value).lower()
            raise ConfigError(f"model.{key}={str(getattr(model, key)).lower()}: {name} needs {key}={set_to}")
    if model.vocab_size <= task.n_symbols:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: {name} needs {task.n_symbols} symbols and a padding token",
            f"set it to {task.n_symbols + 1} or more",
        )


def check_sequences(config: Config) -> None:
    """Check that the settings are consistent and that the source files exist, without reading them.

    Raises:
        ConfigError: If the model doesn't fit the task, or ``data.lra.folder`` isn't set.
        DataError: If a file is missing.
    """
    check_sequence_model(config)
    name, model = task_name(config), config.model
    task = SEQUENCE_TASKS[name]
    if config.data.source == "lra":
        if config.data.lra.folder is None:
            raise ConfigError(
                "data.source=lra: needs a folder", "set data.lra.folder to the unpacked archive"
            )
        needed(name, Path(config.data.lra.folder))
        if name in _WHOLE and model.max_length < task.length:
            raise ConfigError(
                f"model.max_length={model.max_length}: images of {name} need {task.length}",
                f"set it to {task.length} or more",
            )
        return
    bounds = config.data.listops
    if bounds.min_length > bounds.max_length:
        raise ConfigError(
            f"data.listops.min_length={bounds.min_length}: above data.listops.max_length={bounds.max_length}"
        )
    if bounds.max_length > model.max_length:
        raise ConfigError(
            f"data.listops.max_length={bounds.max_length}: above model.max_length={model.max_length}",
            "lower it or raise model.max_length: truncation changes an expression's value",
        )


def prepare_sequences(config: Config) -> LabelledCorpus:
    """Generate or read the rows of all splits, or load them from the cache.

    Raises:
        ConfigError: If the settings are inconsistent, see :func:`check_sequences`.
        DataError: If a file is missing or unusable; the cache is then unchanged.
    """
    check_sequences(config)
    files = _files(config)
    folder, old = (
        cache_folder(config.data) / _key(config, files, version) for version in (VERSION, VERSION - 1)
    )
    if old.is_dir() and not is_prepared(folder):
        print(
            f"{old}: not used: written by an older version without checksums; the sequences are prepared "
            "again, and this old folder may be deleted",
            file=sys.stderr,
        )
    remove_leftovers(folder.parent)
    prepare_once(folder, lambda: _build(config, len(files), folder))
    return read_corpus(folder)


def _build(config: Config, n_files: int, folder: Path) -> None:
    dropped: Counter[str] = Counter()
    report = DataReport(source=config.data.source, unit="sequence", files=n_files, dropped=dropped)
    with atomic_folder(folder, replace=False) as temporary:
        write_corpus(temporary, folder.name, task_name(config), _source(config, dropped), report)


def _source(config: Config, dropped: Counter[str]) -> Iterator[tuple[str, Iterable[Example]]]:
    data = config.data
    if data.source == "listops":
        return _expressions(config)
    return splits(data.lra.task, Path(data.lra.folder or ""), data.val_fraction, config.seed, dropped)


def _files(config: Config) -> list[tuple[str, str]]:
    """Return name and content hash of each file of the task; empty for generated sequences."""
    if config.data.source == "listops":
        return []
    paths = needed(config.data.lra.task, Path(config.data.lra.folder or ""))
    folders = [path for path in paths if path.is_dir()]
    names = [path for path in paths if not path.is_dir()]
    found = list(zip((path.name for path in names), content_hashes(names), strict=True))
    for path in folders:
        found += [(f"{path.name}/{name}", content) for name, content in folder_content(path)]
    return found


def _expressions(config: Config) -> Iterator[tuple[str, Iterable[Example]]]:
    """Yield the ListOps splits; all expressions are distinct, which keeps the splits disjoint."""
    settings = config.data.listops
    expressions = generate(settings, config.seed)
    for split in SPLITS:
        count = getattr(settings, f"{split}_rows")
        rows = progress(itertools.islice(expressions, count), desc=f"ListOps {split}", total=count)
        yield split, (Example((symbols.tobytes(),), value) for symbols, value in rows)


def _key(config: Config, files: list[tuple[str, str]], version: int = VERSION) -> str:
    data = config.data
    parts: tuple[object, ...] = (version, "sequences", data.source, config.seed)
    parts += (
        (asdict(data.listops),) if data.source == "listops" else (data.lra.task, data.val_fraction, files)
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
