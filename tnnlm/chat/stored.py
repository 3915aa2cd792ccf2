"""Chat template next to a tokenizer.json, in the files that Transformers reads and writes."""

from __future__ import annotations

from pathlib import Path

from tnnlm.errors import UserError
from tnnlm.reading import read_json, read_text

TOKENIZER_CONFIG = "tokenizer_config.json"
"""File whose entry ``chat_template`` is the template."""
_SEPARATE = "chat_template.jinja"
"""File of the template alone, which newer versions of Transformers write."""


def stored_template(folder: Path) -> str | None:
    """Return the chat template in the folder of a tokenizer; None if there is none that can be read.

    Users edit these files, and only chats need the template: a damaged one keeps no model from loading.
    """
    try:
        if (folder / _SEPARATE).is_file():
            return read_text(folder / _SEPARATE, "")
        if not (folder / TOKENIZER_CONFIG).is_file():
            return None
        found = read_json(folder / TOKENIZER_CONFIG, "").get("chat_template")
    except (UserError, OSError):
        return None
    if isinstance(found, list):  # several templates by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
