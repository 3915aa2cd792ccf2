"""Documents in memory-mapped Arrow tables, for data sets larger than memory.

Memory holds only the row number, length and hash of each document, about 40 bytes. A streamed data set is
first written to such a table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import datasets
import numpy as np
import pyarrow
from numpy.typing import NDArray

from tnnlm.checksums import list_files, write_signed
from tnnlm.data.prepared import read_entries, verify_files
from tnnlm.data.progress import progress
from tnnlm.data.text import Tally, normalized, text_hash, text_of
from tnnlm.errors import DataError
from tnnlm.files import atomic_file

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
    normalize: bool
    """Whether to normalise each document when it is read, see :func:`~tnnlm.data.text.normalized`."""

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> str | Documents:
        """Return one document, or a lazy slice of them, which keeps the ``size`` of the full sequence."""
        if isinstance(index, slice):
            return replace(self, chosen=self.chosen[index])
        text = str(self.rows[int(self.chosen[index])][self.column])
        return normalized(text) if self.normalize else text

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.chosen), ROWS):
            part = self.chosen[start : start + ROWS]
            first, last = int(part[0]), int(part[-1])
            # Slicing a memory-mapped table copies nothing, unlike a list of indices.
            rows: Any = slice(first, last + 1) if last - first + 1 == len(part) else part.tolist()
            texts = self.rows[rows][self.column]
            yield from map(normalized, texts) if self.normalize else texts


class DocumentIndex(NamedTuple):
    """Index of the rows of a table that contain text."""

    chosen: NDArray[np.int64]
    """Row number of each document, (n,)."""
    lengths: NDArray[np.int64]
    """Length of each document in characters, (n,)."""
    hashes: NDArray[np.bytes_]
    """Hash of each document by :func:`~tnnlm.data.text.text_hash`, (n,)."""
    tally: Tally
    """Counts of the rows."""
    normalize: bool
    """Whether the documents are normalised; lengths and hashes then are those of the normalised text."""

    def select(self, rows: datasets.Dataset, column: str, some: NDArray[np.bool_] | None = None) -> Documents:
        """Return the indexed documents, or those where the boolean mask ``some`` (n,) is true."""
        some = np.ones(len(self.chosen), dtype=bool) if some is None else some
        return Documents(rows, column, self.chosen[some], int(self.lengths[some].sum()), self.normalize)


def index_documents(
    rows: datasets.Dataset,
    column: str,
    where: str,
    *,
    seed: int,
    limit: int | None,
    kept: Path,
    normalize: bool,
    content: str = "",
    blank: bool = False,
) -> DocumentIndex:
    """Index the first ``limit`` rows that contain text, in one pass.

    Args:
        rows: Table to index.
        column: Name of the text column.
        where: Name of the table in error messages and progress bars.
        seed: Seed of the document hashes.
        limit: Maximum number of documents; None for all.
        kept: File of the index (.npz); its record has the same name (.json). It is loaded if the record
            exists, otherwise written.
        normalize: Normalise the documents.
        content: Hash of the files that the table was read from, if they are local: the table's own
            fingerprint follows from their paths and times.
        blank: Keep rows of white space, which are blank lines of the text; their hash is zero.

    Raises:
        DataError: If a row isn't a string in UTF-8, or ``kept`` is damaged or the index of another table.
    """
    parts = (rows._fingerprint, content, len(rows), column, seed, limit, normalize)
    fingerprint = " ".join(map(str, parts))
    if os.path.lexists(_record_of(kept)):
        return _load_index(kept, fingerprint, where, normalize)
    chosen, lengths, hashes = [], [], []
    tally = Tally()
    cells = _checked_cells(rows, column, where)
    for row, cell in enumerate(progress(cells, desc=f"read {where}", unit="doc", total=len(rows))):
        text = tally.keep(text_of(cell, column, f"{where}: row {row + 1}"), normalize, blank)
        if text is not None:
            chosen.append(row)
            lengths.append(len(text))
            hashes.append(text_hash(seed, text) if text.strip() else b"")
            if len(chosen) == limit:
                break
    columns = np.array(chosen, np.int64), np.array(lengths, np.int64), np.array(hashes, "S16")
    index = DocumentIndex(*columns, tally=tally, normalize=normalize)
    _save_index(index, kept, fingerprint)
    return index


def _record_of(kept: Path) -> Path:
    """Return the path of the record of an index, which is written after the index."""
    return kept.with_suffix(".json")


def _load_index(kept: Path, fingerprint: str, where: str, normalize: bool) -> DocumentIndex:
    """Return the index of an earlier attempt.

    Raises:
        DataError: If it is damaged, or the index of a table with another fingerprint.
    """
    record = read_entries(_record_of(kept))
    if record["fingerprint"] != fingerprint:
        raise DataError(
            f"{where}: has changed since its preparation began", f"remove {kept.parent} to start over"
        )
    verify_files(kept.parent, record["checksums"])
    tally = Tally.from_dict(record["tally"])
    with np.load(kept) as arrays:
        return DocumentIndex(arrays["chosen"], arrays["lengths"], arrays["hashes"], tally, normalize)


def _save_index(index: DocumentIndex, kept: Path, fingerprint: str) -> None:
    with atomic_file(kept) as temporary, temporary.open("wb") as file:
        np.savez(file, chosen=index.chosen, lengths=index.lengths, hashes=index.hashes)
    checksums = list_files(kept.parent, [kept.name])
    entries = {"fingerprint": fingerprint, "tally": index.tally.to_dict(), "checksums": checksums}
    write_signed(_record_of(kept), entries)


def _checked_cells(rows: datasets.Dataset, column: str, where: str) -> Iterator[Any]:
    """Yield the cells of a column.

    Raises:
        DataError: If a row has text that isn't UTF-8.
    """
    number = 0
    try:
        for cell in Documents(rows, column, np.arange(len(rows)), 0, normalize=False):
            number += 1
            yield cell
    except UnicodeDecodeError:
        for row in range(number, len(rows)):  # The block of rows that failed begins here.
            _checked_row(rows, row, where)
        raise


def _checked_row(rows: datasets.Dataset, row: int, where: str) -> None:
    try:
        rows[row]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: row {row + 1}: is not UTF-8 text (byte {error.start})") from None


def _streamed(rows: datasets.IterableDataset, where: str, before: int) -> Iterator[tuple[int, Any]]:
    """Yield the number of each row of a stream, of which ``before`` were read earlier, and the row.

    Raises:
        DataError: If a row isn't UTF-8. The message names the row before it: some formats are decoded in
            blocks of rows.
    """
    number, source = before, iter(rows)
    while True:
        try:
            row = next(source, None)
        except UnicodeDecodeError as error:
            place = f"after row {number}: is not UTF-8 text (byte {error.start})"
            raise DataError(f"{where}: {place}") from None
        if row is None:
            return
        number += 1
        yield number, row


def materialize_stream(
    rows: datasets.IterableDataset,
    column: str,
    where: str,
    *,
    limit: int,
    folder: Path,
    name: str,
    normalize: bool,
    blank: bool = False,
) -> tuple[datasets.Dataset, Tally]:
    """Write the first ``limit`` documents of a stream to Arrow files in ``folder``, and open them as a table.

    Resumes after an interruption: the state of the stream is saved with every finished file.

    Args:
        rows: Stream of rows.
        column: Name of the text column.
        where: Name of the data set in error messages and progress bars.
        limit: Maximum number of documents.
        folder: Folder of the Arrow files and the saved state.
        name: Prefix of the file names, usually the split.
        normalize: Normalise the documents.
        blank: Keep rows of white space, which are blank lines of the text.

    Returns:
        The table and the counts of the rows that were read.

    Raises:
        DataError: If a row isn't a string in UTF-8, or a file of an earlier attempt is damaged.
    """
    journal = folder / f"{name}.stream.json"
    tally = Tally()
    state: dict[str, Any] = {"checksums": {}, "done": False}
    if os.path.lexists(journal):
        state = read_entries(journal)
        verify_files(folder, state["checksums"])
        rows.load_state_dict(state["stream"])
        tally = Tally.from_dict(state["tally"])
    source = _streamed(rows, where, tally.documents + tally.dropped.total())

    def keep(number: int, row: dict[str, Any]) -> str | None:
        return tally.keep(text_of(row.get(column), column, f"{where}: row {number}"), normalize, blank)

    texts_left = _kept(source, keep, lambda: tally.documents < limit)
    with progress(total=limit, initial=tally.documents, desc=f"stream {where}", unit="doc") as bar:
        while not state["done"]:
            texts = _texts_of_a_file(texts_left, bar)
            path = folder / f"{name}-{len(state['checksums']):05}.arrow"
            _write_table(texts, path)
            state = {
                "tally": tally.to_dict(),
                "checksums": state["checksums"] | list_files(folder, [path.name]),
                "stream": rows.state_dict(),
                "done": sum(map(len, texts)) < CHARACTERS,
            }
            write_signed(journal, state)
    tables = [datasets.Dataset.from_file(str(folder / file)) for file in state["checksums"]]
    return datasets.concatenate_datasets(tables), tally


def _kept(
    source: Iterator[tuple[int, dict[str, Any]]],
    keep: Callable[[int, dict[str, Any]], str | None],
    room: Callable[[], bool],
) -> Iterator[str]:
    """Yield the documents of rows that are kept, and read no row without room for its document."""
    while room() and (found := next(source, None)) is not None:
        text = keep(*found)
        if text is not None:
            yield text


def _texts_of_a_file(texts: Iterator[str], bar: Any) -> list[str]:
    """Return the next documents, up to the first at which a file has ``CHARACTERS``."""
    taken: list[str] = []
    size = 0
    while size < CHARACTERS and (text := next(texts, None)) is not None:
        taken.append(text)
        size += len(text)
        bar.update()
    return taken


def remove_scratch(folder: Path) -> None:
    """Delete the intermediate files that loading a corpus wrote to ``folder``."""
    for pattern in ("*.arrow", "*.stream.json", "*.survey.npz", "*.survey.json", "*.documents"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_table(texts: list[str], path: Path) -> None:
    table = pyarrow.table({TEXT: pyarrow.array(texts, type=pyarrow.large_string())})
    with atomic_file(path) as temporary, pyarrow.ipc.new_stream(str(temporary), table.schema) as writer:
        writer.write_table(table)
