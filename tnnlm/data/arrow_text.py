"""Documents that stay on the disk: rows of an Arrow table that are read as they are used.

For data sets larger than memory. What is held per document is its row, its length and a hash:
about 40 bytes. A data set that comes as a stream is written to such a table first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import datasets
import numpy as np
import pyarrow
from numpy.typing import NDArray
from tqdm import tqdm

from tnnlm.errors import DataError
from tnnlm.files import atomic_file, write_text

ROWS = 256
"""that are read at a time"""
CHARACTERS = 1 << 26
"""of a stream in one file: what a kill can cost"""
TEXT = "text"
"""the column of written tables"""


@dataclass(frozen=True, eq=False)
class Documents(Sequence[str]):
    """Some rows of a table, in order, as texts."""

    rows: datasets.Dataset
    column: str
    chosen: NDArray[np.int64]
    size: int
    """characters of all together"""

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> str | Documents:
        """A text; or a part of them, of which none is read (its ``size`` stays that of the whole)."""
        if isinstance(index, slice):
            return Documents(self.rows, self.column, self.chosen[index], self.size)
        return str(self.rows[int(self.chosen[index])][self.column])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.chosen), ROWS):
            part = self.chosen[start : start + ROWS]
            first, last = int(part[0]), int(part[-1])
            # A slice of a memory-mapped table copies nothing.
            rows: Any = slice(first, last + 1) if last - first + 1 == len(part) else part.tolist()
            yield from self.rows[rows][self.column]


class DocumentIndex(NamedTuple):
    """The rows of a table that hold text, found in one pass."""

    chosen: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """characters of each"""
    hashes: NDArray[np.bytes_]

    def select(self, rows: datasets.Dataset, column: str, some: NDArray[np.bool_] | None = None) -> Documents:
        """The texts that were found, or some of them."""
        some = np.ones(len(self.chosen), dtype=bool) if some is None else some
        return Documents(rows, column, self.chosen[some], int(self.lengths[some].sum()))


def text_hash(seed: int, text: str) -> bytes:
    """Decides by its order what is held out; 16 of the 32 bytes tell documents apart as well."""
    return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()[:16]


def text_of(cell: Any, column: str, where: str) -> str:
    """The text of a cell; empty where there is none.

    Raises:
        DataError: if it holds something else.
    """
    if cell is not None and not isinstance(cell, str):
        raise DataError(f"{where}: column {column!r} is not text", "choose one with data.text_column=...")
    return cell or ""


def index_documents(
    rows: datasets.Dataset, column: str, where: str, *, seed: int, limit: int | None, kept: Path
) -> DocumentIndex:
    """Find the rows with text in them, the first ``limit``.

    Args:
        rows: the table.
        column: that holds the text.
        where: names the table in errors.
        seed: of the hashes.
        limit: documents at the most.
        kept: file of the index, read if it was made before, else written.

    Raises:
        DataError: for a row that is not text, and for a kept index of another table.
    """
    fingerprint = np.array(f"{rows._fingerprint} {len(rows)} {column} {seed} {limit}")
    if kept.is_file():
        with np.load(kept) as found:
            if found["fingerprint"] != fingerprint:
                raise DataError(
                    f"{where}: has changed since its preparation began", f"remove {kept.parent} to begin anew"
                )
            return DocumentIndex(found["chosen"], found["lengths"], found["hashes"])
    chosen, lengths, hashes = [], [], []
    texts = Documents(rows, column, np.arange(len(rows)), 0)
    for index, text in enumerate(
        tqdm(texts, desc=f"read {where}", unit="doc", unit_scale=True, disable=None)
    ):
        if text_of(text, column, f"{where}: row {index + 1}").strip():
            chosen.append(index)
            lengths.append(len(text))
            hashes.append(text_hash(seed, text))
            if len(chosen) == limit:
                break
    made = DocumentIndex(np.array(chosen, np.int64), np.array(lengths, np.int64), np.array(hashes, "S16"))
    with atomic_file(kept) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = made._asdict()
        np.savez(file, fingerprint=fingerprint, **arrays)
    return made


def materialize_stream(
    rows: datasets.IterableDataset, column: str, where: str, *, limit: int, folder: Path, name: str
) -> datasets.Dataset:
    """Write the first ``limit`` documents of a stream to files in ``folder``, and open them as a table.

    Goes on where it was stopped: every finished file comes with the place in the stream where it ends.

    Raises:
        DataError: for a row that is not text.
    """
    journal = folder / f"{name}.stream.json"
    state: dict[str, Any] = {"documents": 0, "files": 0, "stream": None, "done": False}
    if journal.is_file():
        state = json.loads(journal.read_text(encoding="utf-8"))
        if state["stream"] is not None:
            rows.load_state_dict(state["stream"])
    bar = tqdm(
        total=limit,
        initial=state["documents"],
        desc=f"stream {where}",
        unit="doc",
        unit_scale=True,
        disable=None,
    )
    source = iter(rows)
    with bar:
        while not state["done"]:
            texts: list[str] = []
            size = 0
            while size < CHARACTERS and state["documents"] + len(texts) < limit:
                row = next(source, None)
                if row is None:
                    break
                text = text_of(row.get(column), column, where)
                if text.strip():
                    texts.append(text)
                    size += len(text)
                    bar.update()
            _write_table(texts, folder / f"{name}-{state['files']:05}.arrow")
            state = {
                "documents": state["documents"] + len(texts),
                "files": state["files"] + 1,
                "stream": rows.state_dict(),
                "done": size < CHARACTERS,
            }
            write_text(journal, json.dumps(state))
    tables = [datasets.Dataset.from_file(str(folder / f"{name}-{i:05}.arrow")) for i in range(state["files"])]
    return datasets.concatenate_datasets(tables)


def remove_scratch(folder: Path) -> None:
    """Remove what :func:`index_documents` and :func:`materialize_stream` left in ``folder``."""
    for pattern in ("*.arrow", "*.stream.json", "*.survey.npz"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_table(texts: list[str], path: Path) -> None:
    table = pyarrow.table({TEXT: pyarrow.array(texts, type=pyarrow.large_string())})
    with atomic_file(path) as temporary, pyarrow.ipc.new_stream(str(temporary), table.schema) as writer:
        writer.write_table(table)
