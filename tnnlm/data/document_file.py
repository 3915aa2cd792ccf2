"""File of all documents of a source with its index, which a killed preparation finds again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnnlm.checksums import list_files, write_signed
from tnnlm.data.prepared import read_entries, verify_files
from tnnlm.data.stored_texts import StoredTexts, TextWriter
from tnnlm.files import atomic_file


@dataclass(frozen=True, eq=False)
class StoredDocuments:
    """Documents of a source with their places, lengths and hashes."""

    path: Path
    starts: NDArray[np.int64]
    """First byte of each document, (n,)."""
    stops: NDArray[np.int64]
    """End of each document in bytes, (n,)."""
    lengths: NDArray[np.int64]
    """Length of each document in characters, (n,)."""
    hashes: NDArray[np.bytes_]
    """Hash of each document by :func:`~tnnlm.data.text.text_hash`, (n,)."""
    entries: dict[str, Any]
    """Further entries of the record, such as counts."""

    def texts(self, some: NDArray[np.bool_] | None = None) -> StoredTexts:
        """Return the documents, or those where the boolean mask ``some`` (n,) is true."""
        some = np.ones(len(self.starts), dtype=bool) if some is None else some
        return StoredTexts(self.path, self.starts[some], self.stops[some], int(self.lengths[some].sum()))


def stored_documents(
    folder: Path, key: str, name: str, seed: int, write: Callable[[TextWriter], dict[str, Any]]
) -> StoredDocuments:
    """Write the documents of a source to a file, unless an earlier attempt with the same key did.

    Args:
        folder: Folder of the file, its index and its record.
        key: Hash of what determines the documents.
        name: Name of the files.
        seed: Seed of the hashes of the documents.
        write: Function that writes the documents and returns further entries of the record.

    Raises:
        DataError: If the file of an earlier attempt is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, index, record = (folder / f"{name}.{end}" for end in ("documents", "survey.npz", "survey.json"))
    entries = read_entries(record) if os.path.lexists(record) else None
    if entries is not None and entries["key"] == key:
        verify_files(folder, entries["checksums"])
    else:
        record.unlink(missing_ok=True)
        with TextWriter(path, seed) as writer:
            more = write(writer)
        with atomic_file(index) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **writer.columns())
        entries = {**more, "key": key, "checksums": list_files(folder, [path.name, index.name])}
        write_signed(record, entries)
    with np.load(index) as arrays:
        return StoredDocuments(path, **{key: arrays[key] for key in arrays.files}, entries=entries)
