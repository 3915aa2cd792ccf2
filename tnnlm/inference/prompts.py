"""Encoding of prompts, for generation at a terminal, in a program and in the server."""

from __future__ import annotations

from tnnlm.coverage import coverage
from tnnlm.errors import UserError, one_line
from tnnlm.tokenizer import TextTokenizer


def encode_prompt(tokenizer: TextTokenizer, text: str, parse_special: bool = False) -> list[int]:
    """Return the token ids of a prompt, at least one; arguments are those of :meth:`TextTokenizer.encode`.

    Raises:
        UserError: If the prompt is empty or not valid Unicode, or the tokenizer does not encode it or knows
            none of its characters.
    """
    if text == "":
        raise UserError("prompt: is empty", "give at least one character")
    try:
        tokens = tokenizer.encode(text, parse_special)
    except (TypeError, UnicodeEncodeError):
        raise UserError("prompt: is not valid UTF-8") from None
    except Exception as error:  # the library raises bare Exception, for example if there is no unknown token
        raise UserError(f"prompt: the tokenizer can't encode {text[:40]!r} ({one_line(error)})") from None
    if not tokens:
        raise UserError(f"prompt: the tokenizer encodes {text[:40]!r} as no tokens", "give other text")
    if tokenizer.unknown_id in tokens and _nothing_known(tokenizer, text, tokens):
        raise UserError(f"prompt: the tokenizer knows no character of {text[:40]!r}", "give other text")
    return tokens


def _nothing_known(tokenizer: TextTokenizer, text: str, tokens: list[int]) -> bool:
    """Return whether tokens of a text tell nothing of it but white space."""
    special = tokenizer.detokenizer.is_special
    if any(special(token) and token != tokenizer.unknown_id for token in tokens):
        return False
    visible = len("".join(text.split()))
    return visible > 0 and coverage(tokenizer, [text]).unknown == visible
