"""From settings to labelled rows on disk: generated or read once, then found in the cache."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tnnlm.config.schema import Config
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
from tnnlm.errors import ConfigError
from tnnlm.files import atomic_folder

VERSION = 1
"""part of the cache's key: raise it when the rows change"""
_WHOLE = ("image", "pathfinder", "pathx")


def task_name(config: Config) -> str:
    """Which of ``SEQUENCE_TASKS`` is classified."""
    return "listops" if config.data.source == "listops" else config.data.lra.task


def check_sequences(config: Config) -> None:
    """Check the settings against each other and that the files are there; nothing is read yet.

    Raises:
        ConfigError: if the model is too small for the rows, or no folder is given.
        DataError: if a file is missing.
    """
    name, model = task_name(config), config.model
    task = SEQUENCE_TASKS[name]
    for key, value in (("n_classes", task.n_classes), ("pair", task.parts == 2)):
        if getattr(model, key) != value:
            set_to = str(value).lower()
            raise ConfigError(f"model.{key}={str(getattr(model, key)).lower()}: {name} takes {key}={set_to}")
    if model.vocab_size <= task.n_symbols:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: {name} has {task.n_symbols} symbols and one that pads",
            f"set it to {task.n_symbols + 1} or more",
        )
    if config.data.source == "lra":
        if config.data.lra.folder is None:
            raise ConfigError(
                "data.source=lra: needs a folder", "name the archive's folder, data.lra.folder=PATH"
            )
        needed(name, Path(config.data.lra.folder))
        if name in _WHOLE and model.max_length < task.length:
            raise ConfigError(
                f"model.max_length={model.max_length}: pictures of {name} take {task.length}",
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
            "an expression that is cut has another value",
        )


def prepare_sequences(config: Config) -> LabelledCorpus:
    """Generate or read the rows of all splits, or find them in the cache.

    Raises:
        ConfigError, DataError: as :func:`check_sequences`, and for files that can't be used. Nothing is
            left in the cache then.
    """
    check_sequences(config)
    folder = cache_folder(config.data) / _key(config)
    if not (folder / "meta.json").is_file():
        with atomic_folder(folder, replace=False) as temporary:
            write_corpus(temporary, task_name(config), _source(config))
    return read_corpus(folder)


def _source(config: Config) -> Iterator[tuple[str, Iterable[Example]]]:
    data = config.data
    if data.source == "listops":
        return _expressions(config)
    return splits(data.lra.task, Path(data.lra.folder or ""), data.val_fraction, config.seed)


def _expressions(config: Config) -> Iterator[tuple[str, Iterable[Example]]]:
    """All are distinct, so that the splits are disjoint."""
    settings = config.data.listops
    expressions = generate(settings, config.seed)
    for split in SPLITS:
        count = getattr(settings, f"{split}_rows")
        drawn = tqdm(itertools.islice(expressions, count), desc=f"ListOps {split}", total=count, disable=None)
        yield split, (Example((symbols.tobytes(),), value) for symbols, value in drawn)


def _key(config: Config) -> str:
    data = config.data
    parts: tuple[object, ...] = (VERSION, "sequences", data.source, config.seed)
    if data.source == "listops":
        parts += (asdict(data.listops),)
    else:
        paths = needed(data.lra.task, Path(data.lra.folder or ""))
        parts += (data.lra.task, data.val_fraction, [_stamp(path) for path in paths])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _stamp(path: Path) -> tuple[object, ...]:
    """What changes when a file, or what a folder holds, does; files within a folder are not opened."""
    stat = path.stat()
    return (str(path.resolve()), stat.st_mtime_ns, stat.st_size if path.is_file() else None)
