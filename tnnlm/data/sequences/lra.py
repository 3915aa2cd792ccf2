"""Readers of the published files of the Long Range Arena tasks (arXiv 2011.04006).

FOLDER contains the unpacked lra_release, and the two data sets that the release doesn't include:

    listops-1000/basic_{train,val,test}.tsv                      listops
    tsv_data/new_aan_pairs.{train,eval,test}.tsv                 retrieval
    pathfinder32/curv_contour_length_14/{metadata,imgs}/         pathfinder
    pathfinder128/curv_contour_length_14/{metadata,imgs}/        pathx
    aclImdb/{train,test}/{pos,neg}/*.txt                         text, from the IMDB reviews (aclImdb_v1)
    cifar-10-batches-py/{data_batch_1 .. 5,test_batch}           image, from CIFAR-10 for Python

Text is read as bytes, and images as grayscale values in row-major order. Rows are streamed one at a time.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnnlm.data.progress import progress
from tnnlm.data.sequences.listops import encode
from tnnlm.data.sequences.rows import SPLITS, Example
from tnnlm.errors import DataError

Split = tuple[str, Iterable[Example]]
DIFFICULTY = "curv_contour_length_14"
"""Folder of the hardest of Pathfinder's three difficulties, which the Long Range Arena reports."""
GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grayscale conversion (ITU-R BT.601)."""
_PICTURES = {"pathfinder": ("pathfinder32", 32), "pathx": ("pathfinder128", 128)}
_NESTED = (".", "lra_release", "lra_release/lra_release")
_CIFAR = "cifar-10-batches-py"
_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def needed(task: str, folder: Path) -> list[Path]:
    """Return the files and folders that a task needs.

    Args:
        task: Name of a task in ``SEQUENCE_TASKS``.
        folder: Folder of the unpacked archive.

    Raises:
        DataError: If one of them is missing; the message contains the path of the first.
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
        raise DataError(
            f"data.lra.folder={folder}: no such folder", f"set it to the folder that contains {names[0]}"
        )
    root = next((folder / nested for nested in _NESTED if (folder / nested / names[0]).exists()), folder)
    paths = [root / name for name in names]
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{path}: not found",
                f"provide all files of data.lra.task={task} in {folder}: {', '.join(names)}",
            )
    return paths


def splits(
    task: str, folder: Path, val_fraction: float, seed: int, dropped: Counter[str] | None = None
) -> Iterator[Split]:
    """Yield the name and rows of each split of a task; consume the rows before the next split.

    Sources without a validation split hold out a random ``val_fraction`` of their training split. Pathfinder
    is split 80 : 10 : 10 at random, as in the Long Range Arena.

    Args:
        task: Name of a task in ``SEQUENCE_TASKS``.
        folder: Folder of the unpacked archive.
        val_fraction: Fraction of the training rows to hold out for validation.
        seed: Seed of the random splits.
        dropped: Counts of skipped rows by reason, updated while the rows are read.

    Raises:
        DataError: If a file is missing or malformed.
    """
    paths = needed(task, folder)
    if task == "listops":
        yield from zip(SPLITS, map(_expressions, paths), strict=True)
    elif task == "retrieval":
        yield from zip(SPLITS, map(_pairs, paths), strict=True)
    elif task == "text":
        train, val = _random_split(_list_files(paths[:2]), val_fraction, seed)
        for name, files in zip(SPLITS, (train, val, _list_files(paths[2:])), strict=True):
            yield name, _texts(name, files)
    elif task == "image":
        pictures, labels = _concatenate([_batch(path) for path in paths[:-1]])
        train, val = _random_split(list(range(len(labels))), val_fraction, seed)
        yield "train", _grayscale(pictures, labels, train)
        yield "val", _grayscale(pictures, labels, val)
        pictures, labels = _concatenate([_batch(paths[-1])])
        yield "test", _grayscale(pictures, labels, range(len(labels)))
    else:
        side = _PICTURES[task][1]
        listed = _read_metadata(paths[0])
        train, rest = _random_split(listed, 0.2, seed)
        val, test = _random_split(rest, 0.5, seed)
        for name, chosen in zip(SPLITS, (train, val, test), strict=True):
            yield name, _read_images(name, chosen, side, Counter() if dropped is None else dropped)


def _random_split(rows: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split rows at random; the second part has ``fraction`` of them, at least one."""
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = max(1, round(fraction * len(rows)))
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def _expressions(path: Path) -> Iterator[Example]:
    """Yield ListOps rows from a TSV file with the header Source, Target."""
    for number, (source, target) in _fields(path, 2):
        if number == 1:
            if (source, target) != (b"Source", b"Target"):
                raise DataError(f"{path}: line 1: expected the header Source<tab>Target")
            continue
        try:
            symbols = encode(source.decode())
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}") from None
        yield Example((symbols.tobytes(),), _label(target, path, number))


def _pairs(path: Path) -> Iterator[Example]:
    """Yield pairs of documents from a TSV file with the columns label, two ids, two documents.

    Quotes are kept as part of the documents, as in the reader of the Long Range Arena.
    """
    for number, (label, _, _, first, second) in _fields(path, 5):
        yield Example((first, second), _label(label, path, number))


def _fields(path: Path, expected: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number of each line and its tab-separated fields."""
    with path.open("rb") as file, progress(file, desc=path.name, unit="row") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != expected:
                raise DataError(
                    f"{path}: line {number}: has {len(fields)} tab-separated fields, expected {expected}"
                )
            yield number, fields


def _label(field: bytes, path: Path, number: int) -> int:
    try:
        label = float(field)  # labels of pairs are 0.0 and 1.0
        if label != int(label):
            raise ValueError
        return int(label)
    except (ValueError, OverflowError):
        raise DataError(f"{path}: line {number}: {field[:20]!r} is not a label") from None


def _list_files(folders: Sequence[Path]) -> list[tuple[Path, int]]:
    """Return the text files of the folders with their labels; the label is the index of the folder."""
    found = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.glob("*.txt"))]
    for label, folder in enumerate(folders):
        if all(other != label for _, other in found):
            raise DataError(f"{folder}: contains no .txt file")
    return found


def _texts(name: str, files: Sequence[tuple[Path, int]]) -> Iterator[Example]:
    for path, label in progress(files, desc=name, unit="doc"):
        yield Example((path.read_bytes(),), label)


class _ArraysOnly(pickle.Unpickler):
    """Unpickler restricted to NumPy arrays and plain data, because a pickle can execute arbitrary code."""

    _ALLOWED = {
        (module, name)
        for core in ("numpy.core", "numpy._core")
        for module, name in ((f"{core}.multiarray", "_reconstruct"), (f"{core}.numeric", "_frombuffer"))
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed global of the pickle.

        Raises:
            pickle.UnpicklingError: If the global isn't needed to load arrays.
        """
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _batch(path: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Return images (N, 3, pixels) and labels of one file of CIFAR-10."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        pictures = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, 1_024)
        labels = [int(label) for label in content[b"labels"]]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a batch of the Python version of CIFAR-10 ({error})") from None
    if len(pictures) != len(labels):
        raise DataError(f"{path}: has {len(pictures)} images but {len(labels)} labels")
    return pictures, labels


def _concatenate(
    batches: Sequence[tuple[NDArray[np.uint8], list[int]]],
) -> tuple[NDArray[np.uint8], list[int]]:
    return np.concatenate([pictures for pictures, _ in batches]), [y for _, labels in batches for y in labels]


def _grayscale(pictures: NDArray[np.uint8], labels: list[int], rows: Iterable[int]) -> Iterator[Example]:
    weights = np.array(GREY)[:, None]
    for row in rows:
        grey = (weights * pictures[row]).sum(0).round().astype(np.uint8)
        yield Example((grey.tobytes(),), labels[row])


def _read_metadata(metadata: Path) -> list[tuple[Path, int]]:
    """Return image paths and labels from all metadata files.

    Despite their suffix .npy the files are text, with lines FOLDER FILE NUMBER LABEL ...
    """
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
        raise DataError(
            f"{metadata}: lists only {len(listed)} images in {len(files)} .npy files, expected 10 or more"
        )
    return listed


def _read_images(
    name: str, listed: Sequence[tuple[Path, int]], side: int, dropped: Counter[str]
) -> Iterator[Example]:
    """Yield images as grayscale rows; empty files in the release are skipped, as in the original code."""
    from PIL import Image

    for path, label in progress(listed, desc=name, unit="image"):
        try:
            if not path.stat().st_size:
                dropped["empty image"] += 1
                continue
            with Image.open(path) as picture:
                grey = np.asarray(picture.convert("L"))
        except FileNotFoundError:
            raise DataError(f"{path}: not found, but listed in {DIFFICULTY}/metadata") from None
        except OSError as error:  # Pillow raises it for files that are not images
            raise DataError(f"{path}: is not a readable image ({str(error).splitlines()[0]})") from None
        if grey.shape != (side, side):
            raise DataError(f"{path}: is {grey.shape[1]} x {grey.shape[0]}, expected {side} x {side}")
        yield Example((grey.tobytes(),), label)
