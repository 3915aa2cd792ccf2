"""Checks of settings that depend on each other, and of the name of a run."""

from __future__ import annotations

import unicodedata

from tnnlm.config.checks import check_value
from tnnlm.config.schema import LABELLED, MASK_TOKEN, SMALLEST_MASKED, SMALLEST_TEXT, Config
from tnnlm.errors import ConfigError

_LONGEST_NAME = 200
"""Maximum size of a name in bytes. File systems allow 255, and the names of other files add to it."""


def check_name(name: str) -> None:
    """Raise an error if a run's name can't be the name of a single folder.

    Raises:
        ConfigError: If the name is empty or too long, contains a separator or a control character, or begins
            or ends with a blank.
    """
    text = name if len(name) <= 40 else f"{name[:37]}..."
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ConfigError(f"name={text!r}: must be a single folder name")
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        raise ConfigError(f"name={text!r}: contains a line break or another control character")
    if name != name.strip():
        raise ConfigError(f"name={text!r}: begins or ends with a blank")
    size = len(name.encode())
    if size > _LONGEST_NAME:
        raise ConfigError(f"name={text!r}: has {size} bytes, and a folder name can have {_LONGEST_NAME}")


def settle_task(config: Config) -> None:
    """Raise an error for settings that the task doesn't have, and set defaults that depend on the task."""
    if config.task == "causal" and config.model.causal is False:
        raise ConfigError(
            "model.causal=false: task=causal predicts the next token and must not see it",
            "omit model.causal, or set task=masked",
        )
    data = config.data
    labelled = data.source in LABELLED
    if labelled != (config.task == "classify"):
        instead = "set task=classify" if labelled else f"set data.source={' or '.join(LABELLED)}"
        raise ConfigError(f"data.source={data.source}: can't be used with task={config.task}", instead)
    if not labelled:
        size = config.model.vocab_size
        check_value(f"model.vocab_size={size}", size, {"low": SMALLEST_TEXT})
    if config.task == "masked":
        data.mask_token = data.mask_token or MASK_TOKEN
        if data.mask_token == data.eos_token:
            raise ConfigError(
                f"data.mask_token={data.mask_token}: is the same as data.eos_token", "set another token"
            )
        if data.tokenizer is None and config.model.vocab_size < SMALLEST_MASKED:
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size}: must be at least {SMALLEST_MASKED} for "
                "task=masked: every byte, an end token and a mask token"
            )
    elif data.mask_token is not None:
        raise ConfigError(
            f"data.mask_token={data.mask_token}: is for task=masked only, not task={config.task}"
        )
