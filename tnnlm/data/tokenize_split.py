"""Tokenization of the documents of a split into a file, which a killed preparation resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tnnlm.data.arrow_text import Documents
from tnnlm.data.chunks import batches_of, line_batches_of
from tnnlm.data.progress import progress
from tnnlm.data.report import SplitInfo
from tnnlm.data.text import TextHash, words_in
from tnnlm.files import write_text
from tnnlm.tokenizer import TextTokenizer

SAVE_SECONDS = 5.0
"""Seconds between the progress records from which a killed preparation resumes."""


def tokenize_split(
    texts: Sequence[str], tokenizer: TextTokenizer, path: Path, title: str, protocol: str = "documents"
) -> SplitInfo:
    """Tokenize documents into a file, resuming from and regularly saving a progress record."""
    done = _packed_before(path)
    if done is None:
        path.write_bytes(np.array([tokenizer.eos_id], dtype=np.int32).tobytes())
        done = SplitInfo(documents=0, tokens=1, bytes=0)
    text_hash = TextHash(done.sha256)
    n_documents, n_tokens, n_bytes, n_words = done.documents, done.tokens, done.bytes, done.words

    def so_far() -> SplitInfo:
        return SplitInfo(n_documents, n_tokens, n_bytes, text_hash.value, n_words)

    rest = texts[n_documents:]
    size = texts.size if isinstance(texts, Documents) else sum(map(len, rest))
    bar = progress(total=size, desc=title, unit="char")
    if isinstance(texts, Documents) and texts:
        bar.update(size * n_documents // len(texts))  # approximate, lengths are unknown
    noted = time.monotonic()
    with path.open("r+b") as file, bar:
        file.truncate(4 * n_tokens)
        file.seek(0, os.SEEK_END)
        for batch in (batches_of if protocol == "documents" else line_batches_of)(rest, tokenizer.encode):
            encodings = tokenizer.encode_batch([chunk.before + chunk.text for chunk in batch])
            for encoding, chunk in zip(encodings, batch, strict=True):
                ids = encoding[chunk.tokens_before :]
                if chunk.ends:
                    ids.append(tokenizer.eos_id)
                n_documents += chunk.ends_document
                file.write(np.array(ids, dtype=np.int32).tobytes())
                n_tokens += len(ids)
                n_words += words_in(chunk.text, chunk.ends)
                # The end token of a line stands for its line end.
                encoded = (chunk.text + "\n" * chunk.ends_line).encode("utf-8", "surrogatepass")
                text_hash.add(encoded, chunk.ends_document)
                n_bytes += len(encoded)
            bar.update(sum(len(chunk.text) for chunk in batch))
            if batch[-1].ends_document and time.monotonic() - noted >= SAVE_SECONDS:
                noted = time.monotonic()
                _note(path, file, so_far())
        _note(path, file, so_far())
    return so_far()


def _journal(path: Path) -> Path:
    return path.with_suffix(".progress")


def _note(path: Path, file: BinaryIO, done: SplitInfo) -> None:
    """Flush the file to disk, then record ``done`` as its progress."""
    file.flush()
    os.fsync(file.fileno())
    write_text(_journal(path), json.dumps(asdict(done)))


def _packed_before(path: Path) -> SplitInfo | None:
    """Return the progress that an earlier attempt recorded, or None if there is none."""
    if not _journal(path).is_file() or not path.is_file():
        return None
    done = SplitInfo(**json.loads(_journal(path).read_text(encoding="utf-8")))
    return done if path.stat().st_size >= 4 * done.tokens else None
