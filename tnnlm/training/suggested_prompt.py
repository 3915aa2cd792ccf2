"""Prompt in the command that the end of a run suggests."""

from __future__ import annotations

from tnnlm.config.schema import Config, TrainerConfig
from tnnlm.data.tasks import TaskData
from tnnlm.models.batches import PADDING

NEUTRAL = "The"
"""Prompt for data without a printable word."""
WORDS, LETTERS = 3, 24
"""Largest number of words and of characters that are taken from a text."""


def suggested_prompt(config: Config, data: TaskData) -> str:
    """Return a prompt that suits the data of a causal model.

    It is the prompt of the samples, unless that is the default, which suits Python source code only: then it
    is the first words of the validation split. It is empty for conversations, which a chat continues.

    Args:
        config: Configuration of the run.
        data: Data of the run, whose validation rows are token ids (L + 1,).
    """
    if config.data.format != "text":
        return ""
    chosen = config.trainer.sample_prompt
    if config.data.source == "stdlib" or chosen != TrainerConfig().sample_prompt:
        return chosen or NEUTRAL
    row = [token for token in data.val[0].tolist() if token != PADDING]
    text = data.tokenizer.decode(row).replace("\ufffd", " ")
    words = " ".join(text.split()[:WORDS])[:LETTERS].strip()
    return words if words.isprintable() and words else NEUTRAL
