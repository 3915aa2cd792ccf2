"""Encoding of the text of a chat template: its special tokens are tokens, those in messages are text.

Otherwise a message that contains the name of the end token would end an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from tnnlm.errors import UserError, one_line
from tnnlm.tokenizer import TextTokenizer

_MARK = "\U0010fffd"
"""Character of private use that stands before the number of a replaced name, and before itself."""
_NUMBERS = 0xF0000
"""Code point of the first number."""


class SpecialTokens:
    """Special tokens of a tokenizer in the text of a template, and hidden in that of messages."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token = tokenizer.eos_token
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items() if token.special}
        self._names = {number: name for name, number in self._ids.items()}
        names = sorted(self._ids, key=len, reverse=True)
        hidden = [_MARK, *names]
        self._hidden = {name: f"{_MARK}{chr(_NUMBERS + index)}" for index, name in enumerate(hidden)}
        self._shown = {code: name for name, code in self._hidden.items()}
        self._to_hide = re.compile("|".join(map(re.escape, hidden)))
        self._to_show = re.compile("|".join(map(re.escape, self._shown)))
        self._to_split = re.compile(f"({'|'.join(map(re.escape, names))})")

    def hide(self, content: str) -> str:
        """Return a message with codes in place of the names of special tokens."""
        return self._to_hide.sub(lambda found: self._hidden[found[0]], content)

    def hide_all(self, value: Any) -> Any:
        """Return a value as JSON can have it, with the strings of its lists and objects as of :meth:`hide`.

        Values of other types, such as the dates of a .parquet file, become strings.

        Raises:
            RecursionError: If it is nested too deeply.
        """
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, dict):
            return {self.hide(str(key)): self.hide_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide_all(item) for item in value]
        return self.hide(str(value))

    def show(self, text: str) -> str:
        """Return a text with the names in place of their codes."""
        return self._to_show.sub(lambda found: self._shown[found[0]], text)

    def begins(self, text: str, start: int) -> bool:
        """Return whether a text that a template made has a special token at a character."""
        return self._to_split.match(text, start) is not None

    def written(self, ids: Sequence[int]) -> str:
        """Return the text of generated tokens as a template has it in an answer, behind the text of a prompt.

        Names of special tokens that are part of ordinary text are hidden.
        """
        parts: list[str] = []
        for special, run in groupby(ids, self.tokenizer.detokenizer.is_special):
            if special:
                parts.extend(self._names[token] for token in run)
            else:
                parts.append(self.hide(self.tokenizer.decode([*run], started=True)))
        return "".join(parts)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that a template made.

        Raises:
            UserError: If it is not valid Unicode.
        """
        return next(self.encode_batch([text]))

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the token ids of each string that a template made; all cores encode them.

        Raises:
            UserError: If a text is not valid Unicode, or the tokenizer can't encode it.
        """
        pieces = [[piece for piece in self._to_split.split(text) if piece] for text in texts]
        plain = [self.show(piece) for parts in pieces for piece in parts if piece not in self._ids]
        try:
            encoded = iter(self.tokenizer.encode_batch(plain))
        except (TypeError, UnicodeEncodeError):
            raise UserError("chat: a message is not valid UTF-8") from None
        except Exception as error:  # the library raises bare Exception, for example without unknown token
            raise UserError(f"chat: the tokenizer can't encode a message ({one_line(error)})") from None
        for parts in pieces:
            ids: list[int] = []
            for piece in parts:
                ids.extend([self._ids[piece]] if piece in self._ids else next(encoded))
            yield ids
