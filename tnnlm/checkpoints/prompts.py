"""Short prompts from the text of a run, which a converted folder keeps in config.json for hints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tnnlm.errors import CheckpointError
from tnnlm.reading import read_json

PROMPTS_ENTRY = "sample_prompts"
"""Entry of config.json."""
MOST, LETTERS = 8, 80
"""Largest number of prompts, and of characters of one."""


def usable_prompts(found: Any) -> tuple[str, ...]:
    """Return the prompts of a file of anyone that can be shown in a line; others are omitted."""
    if not isinstance(found, list | tuple):
        return ()
    texts = [text for text in found[:MOST] if isinstance(text, str)]
    return tuple(text for text in texts if 0 < len(text) <= LETTERS and text.isprintable())


def stored_prompts(folder: Path) -> tuple[str, ...]:
    """Return the prompts of a converted folder that was loaded; none if it is a checkpoint or has none."""
    try:
        return usable_prompts(read_json(folder / "config.json", "").get(PROMPTS_ENTRY))
    except CheckpointError:
        return ()
