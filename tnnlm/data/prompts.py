"""Short prompts from the text of a run, for its samples and for the hints of commands, card and server."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from tnnlm.config.schema import Config
from tnnlm.data.report import DataReport
from tnnlm.data.tasks import TaskData
from tnnlm.models.batches import PADDING
from tnnlm.tokenizer import TextTokenizer

PROMPTS = 3
"""Largest number of prompts."""
WORDS, LETTERS = 3, 24
"""Largest number of words and of characters of a prompt."""


def sample_prompts(config: Config, data: TaskData) -> list[str]:
    """Return prompts that suit the data of a causal model: that of the settings, then words of its text.

    There are none for conversations, where a prompt would be a message, nor for other tasks.

    Args:
        config: Configuration of the run.
        data: Data of the run, whose validation rows are token ids (L + 1,).
    """
    if config.task != "causal" or config.data.format != "text":
        return []
    chosen = config.trainer.sample_prompt
    found = [chosen] if chosen else []
    places = {len(data.val) * part // PROMPTS for part in range(PROMPTS)}
    for place in sorted(places):
        found.append(_beginning(data.val[place].tolist(), data.tokenizer, place > 0))
    return list(dict.fromkeys(filter(None, found)))[:PROMPTS]


def with_prompts(config: Config, data: TaskData) -> DataReport:
    """Return the report of the data with the prompts of :func:`sample_prompts`."""
    return replace(data.report, prompts=sample_prompts(config, data))


def _beginning(row: Sequence[int], tokenizer: TextTokenizer, cut: bool) -> str:
    """Return the first words of a row, which may begin inside of a word if ``cut``; empty if unprintable."""
    tokens = [token for token in row if token != PADDING]
    if cut and tokenizer.eos_id in tokens[:-1]:
        tokens = tokens[tokens.index(tokenizer.eos_id) + 1 :]
        cut = False
    words = tokenizer.decode(tokens).replace("\ufffd", " ").split()
    if cut and len(words) > 1:
        words = words[1:]
    text = " ".join(words[:WORDS])
    if len(text) > LETTERS:
        whole = text[: LETTERS + 1].rpartition(" ")[0]
        text = whole or text[: _end_of_character(text, LETTERS)]
    return text if text.isprintable() else ""


def _end_of_character(text: str, end: int) -> int:
    """Return the end of the last whole character of ``text[:end]``, with the marks that combine with it."""
    while 1 < end < len(text) and unicodedata.combining(text[end]):
        end -= 1
    return end
