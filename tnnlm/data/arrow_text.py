"""Documents in memory-mapped Arrow tables, for data sets larger than memory.

Memory holds only the row number, length and hash of each document, about 40 bytes. A streamed data set is
first written to such a table.
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
"""Number of rows read at a time."""
CHARACTERS = 1 << 26
"""Characters per file of a materialised stream; the most that is downloaded again after a kill."""
TEXT = "text"
"""Name of the text column in materialised tables."""


@dataclass(frozen=True, eq=False)
class Documents(Sequence[str]):
    """Sequence of documents backed by selected rows of a table, in order."""

    rows: datasets.Dataset
    column: str
    chosen: NDArray[np.int64]
    """Row number of each document, (n,)."""
    size: int
    """Total number of characters."""

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> str | Documents:
        """Return one document, or a lazy slice of them, which keeps the ``size`` of the full sequence."""
        if isinstance(index, slice):
            return Documents(self.rows, self.column, self.chosen[index], self.size)
        return str(self.rows[int(self.chosen[index])][self.column])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.chosen), ROWS):
            part = self.chosen[start : start + ROWS]
            first, last = int(part[0]), int(part[-1])
            # Slicing a memory-mapped table copies nothing, unlike a list of indices.
            rows: Any = slice(first, last + 1) if last - first + 1 == len(part) else part.tolist()
            yield from self.rows[rows][self.column]


class DocumentIndex(NamedTuple):
    """Index of the rows of a table that contain text."""

    chosen: NDArray[np.int64]
    """Row number of each document, (n,)."""
    lengths: NDArray[np.int64]
    """Length of each document in characters, (n,)."""
    hashes: NDArray[np.bytes_]
    """Hash of each document by :func:`text_hash`, (n,)."""

    def select(self, rows: datasets.Dataset, column: str, some: NDArray[np.bool_] | None = None) -> Documents:
        """Return the indexed documents, or those where the boolean mask ``some`` (n,) is true."""
        some = np.ones(len(self.chosen), dtype=bool) if some is None else some
        return Documents(rows, column, self.chosen[some], int(self.lengths[some].sum()))


def text_hash(seed: int, text: str) -> bytes:
    """Return the first 16 bytes of the SHA-256 hash of seed and document.

    The order of the hashes determines the validation split; 16 bytes are enough to tell documents apart.
    """
    return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()[:16]


def text_of(cell: Any, column: str, where: str) -> str:
    """Return the string in a table cell, or an empty string if the cell is null.

    Raises:
        DataError: If the cell contains something other than a string.
    """
    if cell is not None and not isinstance(cell, str):
        raise DataError(
            f"{where}: column {column!r} is not text", "select the text column with data.text_column=..."
        )
    return cell or ""


def index_documents(
    rows: datasets.Dataset, column: str, where: str, *, seed: int, limit: int | None, kept: Path
) -> DocumentIndex:
    """Index the first ``limit`` rows that contain text, in one pass.

    Args:
        rows: Table to index.
        column: Name of the text column.
        where: Name of the table in error messages and progress bars.
        seed: Seed of the document hashes.
        limit: Maximum number of documents; None for all.
        kept: File of the index (.npz). It is loaded if it exists, otherwise written.

    Raises:
        DataError: If a row isn't a string, or ``kept`` is the index of another table.
    """
    fingerprint = np.array(f"{rows._fingerprint} {len(rows)} {column} {seed} {limit}")
    if kept.is_file():
        with np.load(kept) as found:
            if found["fingerprint"] != fingerprint:
                raise DataError(
                    f"{where}: has changed since its preparation began", f"remove {kept.parent} to start over"
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
    """Write the first ``limit`` documents of a stream to Arrow files in ``folder``, and open them as a table.

    Resumes after an interruption: the state of the stream is saved with every finished file.

    Args:
        rows: Stream of rows.
        column: Name of the text column.
        where: Name of the data set in error messages and progress bars.
        limit: Maximum number of documents.
        folder: Folder of the Arrow files and the saved state.
        name: Prefix of the file names, usually the split.

    Raises:
        DataError: If a row isn't a string.
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
    """Delete the files that :func:`index_documents` and :func:`materialize_stream` wrote to ``folder``."""
    for pattern in ("*.arrow", "*.stream.json", "*.survey.npz"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_table(texts: list[str], path: Path) -> None:
    table = pyarrow.table({TEXT: pyarrow.array(texts, type=pyarrow.large_string())})
    with atomic_file(path) as temporary, pyarrow.ipc.new_stream(str(temporary), table.schema) as writer:
        writer.write_table(table)
