"""Tokenization of the documents of a split into shards, which a killed preparation resumes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tnnlm.checksums import write_signed
from tnnlm.data.arrow_text import Documents
from tnnlm.data.chunks import batches_of, line_batches_of
from tnnlm.data.prepared import again, read_entries
from tnnlm.data.progress import progress
from tnnlm.data.report import SplitInfo
from tnnlm.data.text import TextHash, words_in
from tnnlm.data.token_files import Layout, TokenWriter
from tnnlm.tokenizer import TextTokenizer

SAVE_SECONDS = 5.0
"""Seconds between the progress records from which a killed preparation resumes."""


class WrittenSplit(NamedTuple):
    """Sizes and files of a split."""

    info: SplitInfo
    files: dict[str, list[Any]]
    """Size in bytes and checksum of each shard by name, for :func:`~tnnlm.data.prepared.verify_files`."""


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
    done = _written_before(writer, folder, split)
    if done is None:
        writer.write([tokenizer.eos_id])
        done = SplitInfo(documents=0, tokens=1, bytes=0)
    text_hash = TextHash(done.sha256)
    n_documents, n_bytes, n_words = done.documents, done.bytes, done.words

    def so_far() -> SplitInfo:
        return SplitInfo(n_documents, writer.n_tokens, n_bytes, text_hash.value, n_words)

    rest = texts[n_documents:]
    size = texts.size if isinstance(texts, Documents) else sum(map(len, rest))
    bar = progress(total=size, desc=f"tokenize {split}", unit="char")
    if isinstance(texts, Documents) and texts:
        bar.update(size * n_documents // len(texts))  # approximate, lengths are unknown
    noted = time.monotonic()
    with writer, bar:
        for batch in (batches_of if protocol == "documents" else line_batches_of)(rest, tokenizer.encode):
            encodings = tokenizer.encode_batch([chunk.before + chunk.text for chunk in batch])
            for encoding, chunk in zip(encodings, batch, strict=True):
                ids = encoding[chunk.tokens_before :]
                if chunk.ends:
                    ids.append(tokenizer.eos_id)
                n_documents += chunk.ends_document
                writer.write(ids)
                n_words += words_in(chunk.text, chunk.ends)
                # The end token of a line stands for its line end.
                encoded = (chunk.text + "\n" * chunk.ends_line).encode("utf-8", "surrogatepass")
                text_hash.add(encoded, chunk.ends_document)
                n_bytes += len(encoded)
            bar.update(sum(len(chunk.text) for chunk in batch))
            if batch[-1].ends_document and time.monotonic() - noted >= SAVE_SECONDS:
                noted = time.monotonic()
                _note(writer, folder, split, so_far())
        _note(writer, folder, split, so_far())
    return WrittenSplit(so_far(), writer.files())


def _journal(folder: Path, split: str) -> Path:
    return folder / f"{split}.progress"


def _note(writer: TokenWriter, folder: Path, split: str, done: SplitInfo) -> None:
    """Flush the shards to disk, then record ``done`` as their progress."""
    writer.sync()
    record = {"done": asdict(done), "layout": [*writer.layout], "checksums": writer.checksums}
    write_signed(_journal(folder, split), record)


def _written_before(writer: TokenWriter, folder: Path, split: str) -> SplitInfo | None:
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
    done = SplitInfo(**record["done"])
    if record["layout"] != [*writer.layout]:  # written by a version with shards of another size
        path.unlink()
        return _written_before(writer, folder, split)
    writer.resume(done.tokens, record["checksums"], again(folder))
    return done
