"""Log-probabilities of tokens, before temperature, top-k and top-p, and their format in the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tnnlm.detokenizer import Detokenizer, TextStream


class TokenScore(NamedTuple):
    """Token with its log-probability and the most likely alternatives."""

    token: int
    """Id of the token."""
    logprob: float | None
    """Log-probability in nats; None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...]
    """Most likely tokens at this position with their log-probabilities, in descending order."""


def score_tokens(logits: Tensor, tokens: Sequence[int], n: int) -> list[TokenScore]:
    """Score one token per row of logits (B, V), and the ``n`` most likely tokens of the row.

    Ids without a token, whose logits are minus infinity, are not among the most likely.
    """
    scores = logits.double().log_softmax(-1)
    index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
    best = scores.topk(min(n, scores.shape[1]))
    columns = (scores.gather(-1, index)[:, 0], best.indices, best.values)
    return [
        TokenScore(token, score, tuple(top for top in zip(ids, values, strict=True) if top[1] > -math.inf))
        for token, score, ids, values in zip(tokens, *(column.tolist() for column in columns), strict=True)
    ]


def score_rows(
    logits: Tensor, drawn: Sequence[int | Exception], requested: Sequence[int | None]
) -> list[TokenScore | Exception | None]:
    """Score the token of each row of logits (B, V) with the requested number of alternatives.

    Rows that request None, and rows without a token, which have an exception or a negative number, get no
    score. Rows that request the same number are scored together. If that fails, each is scored alone, and the
    rows that fail again give their exception.
    """
    tokens = [-1 if isinstance(token, Exception) else token for token in drawn]
    scores: list[TokenScore | Exception | None] = [None] * len(tokens)
    for n in {n for n in requested if n is not None}:
        rows = [row for row, own in enumerate(requested) if own == n and tokens[row] >= 0]
        if not rows:
            continue
        try:
            found: list[TokenScore | Exception] = [*score_tokens(logits[rows], [tokens[i] for i in rows], n)]
        except Exception:  # of one row at least, which is found here
            found = [_score_alone(logits[row : row + 1], tokens[row], n) for row in rows]
        for row, score in zip(rows, found, strict=True):
            scores[row] = score
    return scores


def _score_alone(logits: Tensor, token: int, n: int) -> TokenScore | Exception:
    try:
        return score_tokens(logits, [token], n)[0]
    except Exception as error:
        return error


class ScoreFormat(Protocol):
    """Format of the ``logprobs`` of one choice, whose tokens are given in order, possibly in parts."""

    def entries(self, scores: Sequence[TokenScore]) -> dict[str, list[Any]]:
        """Return the ``logprobs`` of the next tokens, whose lists are joined to those of other parts."""


class LogprobsFormat:
    """Format of the ``logprobs`` of one choice, whose tokens are given in order, possibly in several parts.

    ``text_offset`` counts characters of the text of the choice, which from there on begins with the text of
    the token. Tokens that are bytes of the same character have the offset of the character. The end token has
    the offset of the end of the text, which contains U+FFFD for a character that it leaves incomplete. Tokens
    that a stop string cuts off have offsets at the end of the text or behind it.
    """

    def __init__(self, detokenizer: Detokenizer, started: bool, n_prompt: int, end: int | None) -> None:
        """Begin a choice.

        Args:
            detokenizer: Detokenizer of the tokenizer.
            started: Whether tokens that are not in the text precede it.
            n_prompt: Number of tokens of an echoed prompt, whose special tokens are part of the text.
            end: Id of the token that ends the text behind the prompt.
        """
        self._detokenizer = detokenizer
        self._stream = TextStream(detokenizer, started)
        self._n_prompt = n_prompt
        self._end = end

    def entries(self, scores: Sequence[TokenScore]) -> dict[str, list[Any]]:
        """Return the ``logprobs`` of the next tokens."""
        words, offsets, tops = [], [], []
        for score in scores:
            first = self._stream.first
            in_prompt = self._n_prompt > 0
            if score.token == self._end and not in_prompt:
                self._stream.finish()
            piece = self._stream.push(score.token, show_special=in_prompt)
            self._n_prompt -= 1
            word = token_word(self._detokenizer, score.token, first)
            if piece and not self._detokenizer.exact and not self._detokenizer.is_special(score.token):
                word = piece
            words.append(word)
            offsets.append(self._stream.start)
            tops.append(None if score.logprob is None else self._top(score, word, first))
        return {
            "tokens": words,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, score: TokenScore, word: str, first: bool) -> dict[str, float]:
        """Return the most likely tokens and the token itself, with a separate key for each id.

        The token itself has the key ``word``, its entry in ``tokens``. Another id with a text that is taken
        has the key ``token_id:N``.
        """
        top: dict[str, float] = {}
        for token, value in score.top:
            key = word if token == score.token else token_word(self._detokenizer, token, first)
            taken = key in top or (key == word and token != score.token)
            top[f"token_id:{token}" if taken else key] = value
        assert score.logprob is not None
        top[word] = score.logprob
        return top


class ChatLogprobsFormat:
    """Format of the ``logprobs`` of one choice of a chat, without an entry for the end token."""

    def __init__(self, detokenizer: Detokenizer, end: int | None) -> None:
        """Begin a choice; ``end`` is the id of the token that ends it."""
        self._detokenizer = detokenizer
        self._end = end

    def entries(self, scores: Sequence[TokenScore]) -> dict[str, list[Any]]:
        """Return the ``logprobs`` of the next tokens."""
        content = []
        for score in scores:
            if score.token == self._end:
                continue
            assert score.logprob is not None
            top = [self._entry(token, value) for token, value in score.top]
            content.append(self._entry(score.token, score.logprob) | {"top_logprobs": top})
        return {"content": content}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._detokenizer.token_bytes(token)
        return {"token": token_word(self._detokenizer, token), "logprob": logprob, "bytes": [*data]}


def token_word(detokenizer: Detokenizer, token: int, first: bool = False) -> str:
    """Return the text of a token; a part of a character is given in bytes, as in OpenAI's API."""
    data = detokenizer.token_bytes(token, first)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(
            chr(byte) if 32 <= byte < 127 and byte != ord("\\") else f"\\x{byte:02x}" for byte in data
        )
