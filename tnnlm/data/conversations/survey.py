"""First reading of conversations: their hashes, counts and the split into training and validation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnnlm.config.schema import DataConfig
from tnnlm.data.conversations.examples import Example, read_examples
from tnnlm.data.split import hold_out
from tnnlm.data.text import Tally, shown, text_hash
from tnnlm.errors import DataError


class Found(NamedTuple):
    """Content of a data set, without its messages."""

    hashes: NDArray[np.bytes_]
    lengths: NDArray[np.int64]
    strings: bool
    tally: Tally


def survey(config: DataConfig, seed: int) -> tuple[Found, NDArray[np.bool_]]:
    """Read a data set once, and return what it has and which conversations are held out.

    Raises:
        DataError: If a row is unusable, or there are too few to train and to validate on.
    """
    found = _read(config, seed, held_out=False)
    if _is_split(config):
        other = _read(config, seed, held_out=True)
        if found.strings != other.strings:
            raise DataError(
                "data: mixes strings and messages in training and validation rows",
                "write all rows in one way",
            )
        joined = [np.concatenate(pair) for pair in zip(found[:2], other[:2], strict=True)]
        chosen = np.arange(len(joined[0])) >= len(found.hashes)
        return Found(joined[0], joined[1], found.strings, found.tally + other.tally), chosen
    if len(np.unique(found.hashes)) == 1:
        raise DataError(
            f"{_place(config)}: has only one conversation, or copies of it, and validation needs another",
            "add rows, or set data.validation",
        )
    return found, hold_out(found.lengths, found.hashes, config.val_fraction)


def select(config: DataConfig, chosen: NDArray[np.bool_]) -> Iterator[Example]:
    """Yield the chosen conversations, which are read again so that they need not be in memory."""
    index = 0
    for held_out in (False, True) if _is_split(config) else (False,):
        for example in read_examples(config, Tally(), held_out):
            if index < len(chosen) and chosen[index]:
                yield example
            index += 1


def _is_split(config: DataConfig) -> bool:
    """Return whether the rows to validate on are given."""
    return bool(config.validation or config.hub_val_split)


def _read(config: DataConfig, seed: int, held_out: bool) -> Found:
    tally, hashes, lengths, strings = Tally(), [], [], False
    for example in read_examples(config, tally, held_out):
        # Entries that a .parquet file adds to messages may be dates or bytes.
        content = json.dumps(example.conversation, sort_keys=True, ensure_ascii=False, default=str)
        hashes.append(text_hash(seed, content))
        lengths.append(len(content))
        strings = example.strings
    if not hashes:
        counts = shown((reason, number) for reason, number in tally.dropped.items()) or "no rows"
        answer = "a message of the role assistant" if config.format == "chat" else "a completion"
        raise DataError(f"{_place(config, held_out)}: has no row with an answer ({counts})", f"add {answer}")
    return Found(np.array(hashes, "S16"), np.array(lengths, np.int64), strings, tally)


def _place(config: DataConfig, held_out: bool = False) -> str:
    """Return the files or the data set that rows are read from."""
    if held_out:
        return ", ".join(config.validation) or f"{config.hub_name}, split {config.hub_val_split}"
    return ", ".join(config.files) or str(config.hub_name)
