"""The tasks of the Long Range Arena (arXiv 2011.04006) from files as they are published.

FOLDER is the unpacked lra_release, into which the two data sets that the release leaves out were unpacked:

    listops-1000/basic_{train,val,test}.tsv                      listops
    tsv_data/new_aan_pairs.{train,eval,test}.tsv                 retrieval
    pathfinder32/curv_contour_length_14/{metadata,imgs}/         pathfinder
    pathfinder128/curv_contour_length_14/{metadata,imgs}/        pathx
    aclImdb/{train,test}/{pos,neg}/*.txt                         text, from the IMDB reviews (aclImdb_v1)
    cifar-10-batches-py/{data_batch_1 .. 5,test_batch}           image, from CIFAR-10 for Python

Texts are bytes, pictures are grey values row by row. Everything is read one row after the other.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tnnlm.data.sequences.listops import encode
from tnnlm.data.sequences.rows import SPLITS, Example
from tnnlm.errors import DataError

Split = tuple[str, Iterable[Example]]
DIFFICULTY = "curv_contour_length_14"
"""the hardest of Pathfinder's three, which the Arena reports"""
GREY = (0.2989, 0.587, 0.114)
"""of red, green and blue"""
_PICTURES = {"pathfinder": ("pathfinder32", 32), "pathx": ("pathfinder128", 128)}
_NESTED = (".", "lra_release", "lra_release/lra_release")
_CIFAR = "cifar-10-batches-py"
_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def needed(task: str, folder: Path) -> list[Path]:
    """Files and folders that a task is read from.

    Raises:
        DataError: naming the first that is missing.
    """
    names = {
        "listops": [f"listops-1000/basic_{split}.tsv" for split in SPLITS],
        "retrieval": [f"tsv_data/new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test")],
        "text": [f"aclImdb/{split}/{kind}" for split in ("train", "test") for kind in ("neg", "pos")],
        "image": [f"{_CIFAR}/{name}" for name in (*_BATCHES, "test_batch")],
        **{
            task: [f"{name}/{DIFFICULTY}/metadata", f"{name}/{DIFFICULTY}/imgs"]
            for task, (name, _) in _PICTURES.items()
        },
    }[task]
    if not folder.is_dir():
        raise DataError(f"data.lra.folder={folder}: no such folder", f"it should hold {names[0]}")
    root = next((folder / nested for nested in _NESTED if (folder / nested / names[0]).exists()), folder)
    paths = [root / name for name in names]
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{path}: not found", f"data.lra.task={task} reads {', '.join(names)} in {folder}"
            )
    return paths


def splits(task: str, folder: Path, val_fraction: float, seed: int) -> Iterator[Split]:
    """Every split of a task with its rows, to be read in turn.

    Where the source has no validation split, ``val_fraction`` of its training split, drawn with ``seed``,
    takes its place; Pathfinder is split 80 : 10 : 10, as the Arena does.

    Raises:
        DataError: if a file is missing or not what it should be.
    """
    paths = needed(task, folder)
    if task == "listops":
        yield from zip(SPLITS, map(_expressions, paths), strict=True)
    elif task == "retrieval":
        yield from zip(SPLITS, map(_pairs, paths), strict=True)
    elif task == "text":
        train, val = _parted(_listed(paths[:2]), val_fraction, seed)
        for name, files in zip(SPLITS, (train, val, _listed(paths[2:])), strict=True):
            yield name, _texts(name, files)
    elif task == "image":
        pictures, labels = _joined([_batch(path) for path in paths[:-1]])
        train, val = _parted(list(range(len(labels))), val_fraction, seed)
        yield "train", _grey(pictures, labels, train)
        yield "val", _grey(pictures, labels, val)
        pictures, labels = _joined([_batch(paths[-1])])
        yield "test", _grey(pictures, labels, range(len(labels)))
    else:
        side = _PICTURES[task][1]
        listed = _described(paths[0])
        train, rest = _parted(listed, 0.2, seed)
        val, test = _parted(rest, 0.5, seed)
        for name, chosen in zip(SPLITS, (train, val, test), strict=True):
            yield name, _drawn(name, chosen, side)


def _parted(rows: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """The rows without, and with, a share drawn by chance: at least one."""
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = max(1, round(fraction * len(rows)))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def _expressions(path: Path) -> Iterator[Example]:
    """Source and Target, tab-separated, below a line that says so."""
    for number, (source, target) in _fields(path, 2):
        if number == 1:
            if (source, target) != (b"Source", b"Target"):
                raise DataError(f"{path}: its first line should read Source<tab>Target")
            continue
        try:
            symbols = encode(source.decode())
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}") from None
        yield Example((symbols.tobytes(),), _label(target, path, number))


def _pairs(path: Path) -> Iterator[Example]:
    """Label, two names, two texts; the texts' quotes are part of them, as for the Arena's own reader."""
    for number, (label, _, _, first, second) in _fields(path, 5):
        yield Example((first, second), _label(label, path, number))


def _fields(path: Path, expected: int) -> Iterator[tuple[int, list[bytes]]]:
    """Lines with their numbers, split at tabs."""
    with path.open("rb") as file, tqdm(file, desc=path.name, unit="row", disable=None) as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != expected:
                raise DataError(
                    f"{path}: line {number} has {len(fields)} fields between tabs, expected {expected}"
                )
            yield number, fields


def _label(field: bytes, path: Path, number: int) -> int:
    try:
        return int(float(field))  # the pairs' are written 0.0 and 1.0
    except ValueError:
        raise DataError(f"{path}: line {number}: {field[:20]!r} is no label") from None


def _listed(folders: Sequence[Path]) -> list[tuple[Path, int]]:
    """Text files and their label: by folder, 0 for the first."""
    found = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.glob("*.txt"))]
    for label, folder in enumerate(folders):
        if all(own != label for _, own in found):
            raise DataError(f"{folder}: holds no .txt file")
    return found


def _texts(name: str, files: Sequence[tuple[Path, int]]) -> Iterator[Example]:
    for path, label in tqdm(files, desc=name, unit="text", disable=None):
        yield Example((path.read_bytes(),), label)


class _ArraysOnly(pickle.Unpickler):
    """Loads arrays and plain data, and calls nothing else: a pickle can run anything."""

    _ALLOWED = {
        (module, name)
        for core in ("numpy.core", "numpy._core")
        for module, name in ((f"{core}.multiarray", "_reconstruct"), (f"{core}.numeric", "_frombuffer"))
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle names, if it is harmless."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _batch(path: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Pictures (N, 3, pixels) and labels of a file of CIFAR-10."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        pictures = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, 1_024)
        labels = [int(label) for label in content[b"labels"]]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a batch of CIFAR-10 for Python ({error})") from None
    if len(pictures) != len(labels):
        raise DataError(f"{path}: holds {len(pictures)} pictures and {len(labels)} labels")
    return pictures, labels


def _joined(
    batches: Sequence[tuple[NDArray[np.uint8], list[int]]],
) -> tuple[NDArray[np.uint8], list[int]]:
    return np.concatenate([pictures for pictures, _ in batches]), [y for _, labels in batches for y in labels]


def _grey(pictures: NDArray[np.uint8], labels: list[int], rows: Iterable[int]) -> Iterator[Example]:
    weights = np.array(GREY)[:, None]
    for row in rows:
        grey = (weights * pictures[row]).sum(0).round().astype(np.uint8)
        yield Example((grey.tobytes(),), labels[row])


def _described(metadata: Path) -> list[tuple[Path, int]]:
    """Pictures and labels of all metadata files: text, in spite of their name, of lines
    FOLDER FILE NUMBER LABEL ..."""
    files = sorted(metadata.glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    listed = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            words = line.split()
            if len(words) < 4 or words[3] not in ("0", "1"):
                raise DataError(
                    f"{path}: line {number}: expected FOLDER FILE NUMBER LABEL, got {line[:40]!r}"
                )
            listed.append((metadata.parent / words[0] / words[1], int(words[3])))
    if len(listed) < 10:
        raise DataError(f"{metadata}: describes {len(listed)} pictures in {len(files)} .npy files; too few")
    return listed


def _drawn(name: str, listed: Sequence[tuple[Path, int]], side: int) -> Iterator[Example]:
    """Pictures as grey values; the release has a few files without content, which the Arena leaves out."""
    from PIL import Image

    for path, label in tqdm(listed, desc=name, unit="picture", disable=None):
        try:
            if not path.stat().st_size:
                continue
            with Image.open(path) as picture:
                grey = np.asarray(picture.convert("L"))
        except FileNotFoundError:
            raise DataError(f"{path}: not found, though {DIFFICULTY}/metadata names it") from None
        except OSError as error:  # of Pillow, for what is no picture
            raise DataError(f"{path}: is not a readable picture ({str(error).splitlines()[0]})") from None
        if grey.shape != (side, side):
            raise DataError(f"{path}: is {grey.shape[1]} x {grey.shape[0]}, expected {side} x {side}")
        yield Example((grey.tobytes(),), label)
