"""Log-probabilities of tokens, as a response shows them: before temperature and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenScore(NamedTuple):
    """A token with its log-probability in nats, and those of the likeliest in its place."""

    token: int
    logprob: float | None
    """None for the first of a prompt"""
    top: tuple[tuple[int, float], ...]


def score_tokens(logits: Tensor, tokens: Sequence[int], n: int) -> list[TokenScore]:
    """Of tokens under logits (B, V), a row each, with the ``n`` likeliest beside them."""
    scores = logits.double().log_softmax(-1)
    index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
    best = scores.topk(min(n, scores.shape[1]))
    columns = (scores.gather(-1, index)[:, 0], best.indices, best.values)
    return [
        TokenScore(token, score, tuple(zip(ids, values, strict=True)))
        for token, score, ids, values in zip(tokens, *(column.tolist() for column in columns), strict=True)
    ]
