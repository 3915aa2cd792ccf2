"""Detokenization: the bytes of single tokens, and the text of a sequence, token by token in linear time.

The bytes of a token follow from the decoder of its tokenizer: byte-level, byte fallback (SentencePiece) and
Metaspace decoders are computed here. Other decoders of ``tokenizers`` run on a window of a few tokens, so
that a token costs the same at any position of any text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any, TypeAlias

from tokenizers import Tokenizer

Step: TypeAlias = Callable[[str, bool], "str | bytes"]
"""Step of a decoder: (string of a token, whether the text begins with the token) -> text, or final bytes."""
CONTEXT = 8
"""Number of tokens before a new one that a decoder without known bytes is given."""
HELD = 4
"""Number of tokens that are held while their text ends in U+FFFD: a character has at most four bytes."""
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE}
_ALPHABET |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}
"""Byte of each character of the alphabet of byte-level tokenizers."""


class Detokenizer:
    """Bytes of the tokens of a tokenizer, and strings of sequences of its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoder = tokenizer.decoder
        self._steps = _steps(None if decoder is None else json.loads(decoder.__getstate__()))
        self._special = {
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        }
        self._known: dict[tuple[int, bool], bytes] = {}

    @cached_property
    def before(self) -> list[int]:
        """Ordinary tokens that stand for those before a text; empty if the tokenizer can't encode them."""
        try:
            return list(self.tokenizer.encode("a", add_special_tokens=False).ids)
        except Exception:  # the library raises bare Exception, for example if there is no unknown token
            return []

    @property
    def exact(self) -> bool:
        """Whether the bytes of a token are the same at every position of a text but its first."""
        return self._steps is not None

    def is_special(self, token: int) -> bool:
        """Return whether a token is special: its name is not part of a text."""
        return token in self._special

    def token_bytes(self, token: int, first: bool = False) -> bytes:
        """Return the bytes that a token adds to a text, which may be a part of a UTF-8 character.

        The bytes of a special token are its name; those of an id without a token are empty. ``first`` tells
        whether the text begins with the token: some tokenizers omit the space before it.
        """
        key = token, first
        if key not in self._known:
            self._known[key] = self._computed(token, first)
        return self._known[key]

    def decode(self, ids: Iterable[int], started: bool = False) -> str:
        """Return the text of tokens without special tokens; bytes that are no UTF-8 become U+FFFD.

        ``started`` tells whether other tokens precede them, so that a space at the beginning is kept.
        """
        shown = [token for token in ids if token not in self._special]
        if self._steps is None:
            before = self.before if started else []
            return self.decode_window([*before, *shown])[len(self.decode_window(before)) :]
        parts = [self.token_bytes(token, not started and i == 0) for i, token in enumerate(shown[:1])]
        parts += [self.token_bytes(token) for token in shown[1:]]
        return b"".join(parts).decode("utf-8", "replace")

    def decode_window(self, ids: list[int]) -> str:
        """Return the text of tokens as the decoder of the tokenizer gives it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _computed(self, token: int, first: bool) -> bytes:
        name = self.tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._special:
            return str(name).encode()
        if self._steps is None:
            return self.decode([token], started=not first).encode()
        text: str | bytes = name
        for step in self._steps:
            if isinstance(text, bytes):
                break
            text = step(text, first)
        return text if isinstance(text, bytes) else text.encode()


class TextStream:
    """Incremental detokenizer that returns complete UTF-8 characters only."""

    def __init__(self, detokenizer: Detokenizer, started: bool = False) -> None:
        """Begin a text, or with ``started`` one that follows other tokens."""
        self._of = detokenizer
        self._first = not started
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window = [*detokenizer.before] if started and not detokenizer.exact else []
        self._decoded = detokenizer.decode_window(self._window) if self._window else ""
        self._n_held = 0
        self.length = 0
        """Number of characters returned."""
        self.start = 0
        """Offset in the text of the first character of the last token; of its end, if the token adds none."""

    @property
    def first(self) -> bool:
        """Whether the text begins with the next token."""
        return self._first

    def fork(self) -> TextStream:
        """Return an independent stream that continues this one, with offsets from this point on."""
        other = TextStream(self._of)
        other._first, other._n_held = self._first, self._n_held
        other._utf8.setstate(self._utf8.getstate())
        other._window, other._decoded = [*self._window], self._decoded
        return other

    def push(self, token: int, show_special: bool = False) -> str:
        """Return the text that a token completes; empty in the middle of a character.

        The name of a special token is part of the text only with ``show_special``.
        """
        self.start = self.length
        special = self._of.is_special(token)
        if special and not show_special:
            return ""
        if self._of.exact or special:
            held = self._release()
            data = self._of.token_bytes(token, self._first)
            # A character that this token doesn't complete becomes U+FFFD in front of it.
            pending = bytes(self._utf8.getstate()[0])
            self.start += len(held) + bool(pending and data and not _is_prefix(pending + data[:1]))
            text = held + self._utf8.decode(data)
        else:
            text = self._slide(token)
        self._first = self._first and special
        self.length += len(text)
        return text

    def finish(self) -> str:
        """Return the remaining text; bytes of an incomplete character become U+FFFD."""
        text = self._release() + self._utf8.decode(b"", final=True)
        self.length += len(text)
        return text

    def _release(self) -> str:
        """Return the text of the tokens that are held, although it may end in an incomplete character."""
        if not self._n_held:
            return ""
        decoded = self._of.decode_window(self._window)
        text = decoded[len(self._decoded) :]
        self._decoded, self._n_held = decoded, 0
        return text

    def _slide(self, token: int) -> str:
        """Decode a token after a bounded number of tokens before it."""
        self._window.append(token)
        self._n_held += 1
        decoded = self._of.decode_window(self._window)
        if decoded.endswith("\ufffd") and self._n_held < HELD:
            return ""
        text = decoded[len(self._decoded) :]
        self._decoded, self._n_held = decoded, 0
        if len(self._window) > 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._decoded = self._of.decode_window(self._window)
        return text


def _is_prefix(data: bytes) -> bool:
    """Return whether bytes are the beginning of a UTF-8 character, or a whole one."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _steps(decoder: dict[str, Any] | None) -> list[Step] | None:
    """Return the steps of a decoder on one token, or None if tokens depend on others in unknown ways."""
    if decoder is None:
        return [_separated]
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    steps: list[Step] = []
    joined = False  # whether earlier steps join tokens, so that later ones see their text as a whole
    for part in parts:
        step = _step(part, joined)
        if step is None:
            return None
        steps.append(step)
        joined = joined or part["type"] in ("ByteLevel", "ByteFallback", "Fuse")
    return steps


def _step(part: dict[str, Any], joined: bool) -> Step | None:
    kind = part["type"]
    if kind == "Fuse":
        return _unchanged
    if kind == "Strip" and joined and part["stop"] == 0:
        return partial(_stripped, re.compile(f"^{re.escape(part['content'])}{{0,{part['start']}}}"))
    if joined:
        return None
    if kind == "ByteLevel":
        return _byte_level
    if kind == "ByteFallback":
        return _byte_fallback
    if kind == "Replace" and "String" in part["pattern"]:
        return partial(_replaced, part["pattern"]["String"], part["content"], part["content"])
    if kind == "Metaspace":
        first = " " if part["prepend_scheme"] == "never" else ""
        return partial(_replaced, part["replacement"], " ", first)
    return None


def _separated(text: str, first: bool) -> str:
    return text if first else f" {text}"


def _unchanged(text: str, first: bool) -> str:
    return text


def _stripped(beginning: re.Pattern[str], text: str, first: bool) -> str:
    return beginning.sub("", text) if first else text


def _replaced(old: str, new: str, new_first: str, text: str, first: bool) -> str:
    return text.replace(old, new_first if first else new)


def _byte_fallback(text: str, first: bool) -> str | bytes:
    found = _BYTE.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else text


def _byte_level(text: str, first: bool) -> bytes:
    try:
        return bytes([_ALPHABET[letter] for letter in text])
    except KeyError:  # an added token, which is not in the alphabet
        return text.encode()
