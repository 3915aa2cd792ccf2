"""Log-probabilities of tokens for responses, before temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenScore(NamedTuple):
    """Token with its log-probability and the most likely alternatives."""

    token: int
    """Id of the token."""
    logprob: float | None
    """Log-probability in nats; None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...]
    """Most likely tokens at this position with their log-probabilities, in descending order."""


def score_tokens(logits: Tensor, tokens: Sequence[int], n: int) -> list[TokenScore]:
    """Score one token per row of logits (B, V), and the ``n`` most likely tokens of the row."""
    scores = logits.double().log_softmax(-1)
    index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
    best = scores.topk(min(n, scores.shape[1]))
    columns = (scores.gather(-1, index)[:, 0], best.indices, best.values)
    return [
        TokenScore(token, score, tuple(zip(ids, values, strict=True)))
        for token, score, ids, values in zip(tokens, *(column.tolist() for column in columns), strict=True)
    ]
