"""Text files and tables in the folder of a test, and the documents that are read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tnnlm.config.schema import DataConfig
from tnnlm.data.sources import load_corpus
from tnnlm.errors import DataError

LINES = "".join(f"line {i} of a text\n" for i in range(20))


def write(name: str, data: str | bytes) -> str:
    """Write a file into the folder of the test."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return name


def jsonl(texts: list[str], column: str = "text") -> str:
    return "".join(json.dumps({column: text}) + "\n" for text in texts)


def parquet(texts: list[str], column: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), sink)
    return bytes(sink.getvalue())


def documents(n: int) -> list[str]:
    """Return distinct documents of unequal length."""
    return [f"document {i}\n" + f"word{i} " * (10 + i % 7) for i in range(n)]


def read(*files: str, seed: int = 0, **changes: Any) -> tuple[list[str], list[str]]:
    """Return both splits of ``files``."""
    corpus = load_corpus(
        DataConfig(**{"source": "files", "files": list(files), **changes}), seed, Path("scratch")
    )
    return list(corpus.train), list(corpus.val)


def error_of(*files: str, **changes: Any) -> str:
    """Return the error message of one line that a user sees."""
    with pytest.raises(DataError) as caught:
        read(*files, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message
