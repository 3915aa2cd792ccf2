"""Tokenization of the documents of a split into shards, which a killed preparation resumes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnnlm.checksums import write_signed
from tnnlm.data.chunks import START, Chunk, Seam, batches_of, line_batches_of
from tnnlm.data.prepared import again, read_entries
from tnnlm.data.progress import progress
from tnnlm.data.report import SplitInfo
from tnnlm.data.stored_texts import bytes_before, characters_of, documents_of
from tnnlm.data.text import TextHash, words_in
from tnnlm.data.token_files import Layout, TokenWriter
from tnnlm.tokenizer import TextTokenizer

AT_ONCE = 2
"""Number of batches that are tokenized at once: while the token ids of one are read, which takes a single
core, the cores tokenize another."""
SAVE_SECONDS = 5.0
"""Seconds between the progress records from which a killed preparation resumes."""


class WrittenSplit(NamedTuple):
    """Sizes and files of a split."""

    info: SplitInfo
    files: dict[str, list[Any]]
    """Size in bytes and checksum of each shard by name, for :func:`~tnnlm.data.prepared.verify_files`."""


class _Progress(NamedTuple):
    """Part of a split that is written."""

    done: SplitInfo
    """Sizes of what is written; its documents are those that have ended."""
    n_bytes: int = 0
    """Number of bytes of the next document that are written."""
    seam: Seam = START
    """Seam after them."""


def tokenize_split(
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    folder: Path,
    split: str,
    layout: Layout,
    protocol: str = "documents",
) -> WrittenSplit:
    """Tokenize documents into shards, resuming from and regularly saving a progress record.

    Args:
        ``texts``: Documents of the split.
        tokenizer: Tokenizer, whose end token follows every document and begins the stream.
        folder: Folder of the shards and of the record.
        split: Name of the split, with which file names begin.
        layout: Format of the shards.
        protocol: ``data.protocol``, which decides where end tokens are.

    Raises:
        DataError: If the progress record of an earlier attempt is damaged.
    """
    writer = TokenWriter(folder, split, layout)
    begun = _written_before(writer, folder, split)
    if begun is None:
        writer.write([tokenizer.eos_id])
        begun = _Progress(SplitInfo(documents=0, tokens=1, bytes=0))
    split_up = batches_of if protocol == "documents" else line_batches_of
    rest = documents_of(texts, begun.done.documents, begun.n_bytes)
    noted = time.monotonic()
    with writer, _bar(texts, split, begun.done) as bar:
        counter = _Counter(begun, texts)
        for batch, ids in _encoded(split_up(rest, tokenizer, begun.seam), tokenizer):
            # The lines of the protocol fairseq lack the white space around them, so that their sizes don't
            # tell where to resume inside of a document.
            resumable = protocol == "documents" or not counter.n_inside
            if time.monotonic() - noted >= SAVE_SECONDS and resumable:
                noted = time.monotonic()
                seam = Seam(batch[0].before, batch[0].tokens_before)
                _note(writer, folder, split, counter.progress(writer.n_tokens, seam))
            writer.write(ids)
            for chunk in batch:
                counter.add(chunk)
            bar.update(sum(len(chunk.text) for chunk in batch))
        done = counter.progress(writer.n_tokens)
        _note(writer, folder, split, done)
    return WrittenSplit(done.done, writer.files())


class _Counter:
    """Counts and hash of what is written."""

    def __init__(self, begun: _Progress, texts: Sequence[str]) -> None:
        """Continue an earlier attempt, of which the document that has begun is read again for its hash."""
        self._documents, self._bytes, self._words = begun.done.documents, begun.done.bytes, begun.done.words
        self._hash = TextHash(begun.done.sha256)
        self.n_inside = begun.n_bytes
        """Number of bytes of the document that has begun."""
        for data in bytes_before(texts, self._documents, self.n_inside):
            self._hash.add(data, False)

    def add(self, chunk: Chunk) -> None:
        """Count a chunk."""
        # The end token of a line stands for its line end.
        encoded = (chunk.text + "\n" * chunk.ends_line).encode("utf-8", "surrogatepass")
        self._hash.add(encoded, chunk.ends_document)
        self._documents += chunk.ends_document
        self._bytes += len(encoded)
        self._words += words_in(chunk.text, chunk.ends) - chunk.cuts_word
        self.n_inside = 0 if chunk.ends_document else self.n_inside + len(encoded)

    def progress(self, n_tokens: int, seam: Seam = START) -> _Progress:
        """Return the progress after ``n_tokens`` were written, with the seam after them."""
        info = SplitInfo(self._documents, n_tokens, self._bytes, self._hash.value, self._words)
        return _Progress(info, self.n_inside, seam)


def _bar(texts: Sequence[str], split: str, done: SplitInfo) -> Any:
    """Return the progress bar of a split of which some documents were written earlier."""
    size = characters_of(texts)
    # The lengths of single documents are unknown.
    return progress(
        total=size,
        initial=size * done.documents // max(1, len(texts)),
        desc=f"tokenize {split}",
        unit="char",
    )


def _encoded(
    batches: Iterable[list[Chunk]], tokenizer: TextTokenizer
) -> Iterator[tuple[list[Chunk], NDArray[np.uint32]]]:
    """Yield each batch with its token ids, end tokens included, while the next ones are tokenized."""
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        waiting: deque[tuple[list[Chunk], Future[NDArray[np.uint32]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_ids_of, batch, tokenizer)))
            if len(waiting) > AT_ONCE:
                encoded, ids = waiting.popleft()
                yield encoded, ids.result()
        for encoded, ids in waiting:
            yield encoded, ids.result()


def _ids_of(batch: list[Chunk], tokenizer: TextTokenizer) -> NDArray[np.uint32]:
    encoded = iter(tokenizer.encode_batch([c.before + c.text for c in batch if c.ids is None]))
    end, parts = np.array([tokenizer.eos_id], np.uint32), []
    for chunk in batch:
        ids = np.array(next(encoded) if chunk.ids is None else chunk.ids, np.uint32)
        parts.append(ids[chunk.tokens_before :] if chunk.ids is None else ids)
        if chunk.ends:
            parts.append(end)
    return np.concatenate(parts)


def _journal(folder: Path, split: str) -> Path:
    return folder / f"{split}.progress"


def _note(writer: TokenWriter, folder: Path, split: str, progress: _Progress) -> None:
    """Flush the shards to disk, then record their progress."""
    writer.sync()
    record = {
        "done": asdict(progress.done),
        "inside": [progress.n_bytes, *progress.seam],
        "layout": [*writer.layout],
        "checksums": writer.checksums,
    }
    write_signed(_journal(folder, split), record)


def _written_before(writer: TokenWriter, folder: Path, split: str) -> _Progress | None:
    """Continue what an earlier attempt recorded; return its progress, or None if there is none.

    Raises:
        DataError: If the record is damaged, or the shards aren't those that it describes.
    """
    path = _journal(folder, split)
    if not os.path.lexists(path):
        for shard in folder.glob(f"{split}-*.bin"):
            shard.unlink()
        return None
    record = read_entries(path)
    n_bytes, *seam = record.get("inside", (0, "", 0))
    begun = _Progress(SplitInfo(**record["done"]), n_bytes, Seam(*seam))
    if record["layout"] != [*writer.layout]:  # written by a version with shards of another size
        path.unlink()
        return _written_before(writer, folder, split)
    writer.resume(begun.done.tokens, record["checksums"], again(folder))
    return begun
