"""Token caches of version 0.1: one file of 32-bit integers per split, without checksums.

They are copied into the present format, so that an update neither tokenizes a large corpus again nor needs
the network on a machine that trains offline.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tnnlm.data.prepared import META
from tnnlm.data.progress import progress
from tnnlm.data.report import DataReport
from tnnlm.data.token_files import Layout, TokenWriter
from tnnlm.errors import DataError
from tnnlm.tokenizer import TextTokenizer

_BLOCK = 1 << 20
"""Tokens that are copied at a time."""


class StoredCorpus(NamedTuple):
    """Tokens of all splits in a folder that is not complete yet."""

    report: DataReport
    layout: Layout
    files: dict[str, list[Any]]
    """Size in bytes and checksum of each shard by name."""


def copy_earlier(old: Path, folder: Path) -> StoredCorpus | None:
    """Copy tokens and tokenizer of a cache of an earlier version into ``folder``, and report it in one line.

    Args:
        old: Folder of the earlier version, which is kept.
        folder: Folder to write to.

    Returns:
        The copy, or None if the old cache is damaged.
    """
    try:
        found = _copy(old, folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        print(f"{old}: is damaged and not used; this folder may be deleted", file=sys.stderr)
        return None
    print(
        f"{old}: not verified: written by an older version; its tokens were copied to a new folder of the "
        "cache, and this old folder may be deleted",
        file=sys.stderr,
    )
    return found


def _copy(old: Path, folder: Path) -> StoredCorpus:
    """Copy an old cache.

    Raises:
        DataError: If its splits, sizes or token ids are wrong.
    """
    report = DataReport.from_dict(json.loads((old / META).read_text(encoding="utf-8")))
    if report.splits.keys() != {"train", "val"}:  # names of files, too
        raise DataError(f"{old}: has other splits than train and val")
    text = (old / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = TextTokenizer.from_json(text, report.eos_token, str(old))
    layout, files = Layout.of(tokenizer.size), dict[str, list[Any]]()
    for split, info in report.splits.items():
        tokens = np.memmap(old / f"{split}.bin", "<i4", mode="r")
        if len(tokens) != info.tokens:
            raise DataError(f"{old}: has another number of tokens than its report")
        with TokenWriter(folder, split, layout) as writer:
            for start in progress(range(0, len(tokens), _BLOCK), desc=f"copy {split}"):
                part = tokens[start : start + _BLOCK]
                if part.min() < 0 or part.max() >= tokenizer.size:
                    raise DataError(f"{old}: has a token outside of the vocabulary")
                writer.write(part)
        files |= writer.files()
    shutil.copyfile(old / "tokenizer.json", folder / "tokenizer.json")
    return StoredCorpus(report, layout, files)
