"""The next token of every row of a running batch, each with its own settings and random stream.

What a row draws depends on its own logits, settings and seed alone, not on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tnnlm.inference.sampling import SamplingParams, tempered

_HEAD = 1024
"""likeliest tokens that are sorted first; all of them only where these don't reach ``top_p``"""


class SequenceSampler:
    """How one sequence's tokens are sampled."""

    def __init__(
        self,
        sampling: SamplingParams,
        vocabulary: int,
        *,
        seed: int | None = None,
        index: int = 0,
        bias: Mapping[int, float] | None = None,
        presence: float = 0.0,
        frequency: float = 0.0,
    ) -> None:
        """Args:
        sampling: temperature and cuts.
        vocabulary: tokens there are.
        seed: of the random stream; None takes a new one.
        index: of several sequences from one seed.
        bias: added to the logits of these tokens.
        presence: taken from the logit of every token that was drawn.
        frequency: taken from it for each time.
        """
        self.sampling = sampling
        self.random = np.random.default_rng(None if seed is None else (seed % (1 << 64), index))
        self._presence, self._frequency = presence, frequency
        self._drawn: set[int] = set()
        self.added: Tensor | None = None
        """to the logits, (V,)"""
        if bias or presence or frequency:
            self.added = torch.zeros(vocabulary)
            for token, value in (bias or {}).items():
                self.added[token] += value

    def took(self, token: int) -> None:
        """Count a token that was drawn."""
        if self.added is None:
            return
        self.added[token] -= self._frequency
        if token not in self._drawn:
            self._drawn.add(token)
            self.added[token] -= self._presence


def sample_batch(logits: Tensor, rows: Sequence[SequenceSampler]) -> list[int]:
    """Sample a token per row of logits (B, V)."""
    logits = logits.float()
    if any(row.added is not None for row in rows):
        logits = logits.clone()
        for own, row in zip(logits, rows, strict=True):
            if row.added is not None:
                own += row.added.to(own.device)
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        chosen = [rows[i] for i in drawn]
        temperatures = torch.tensor([[row.sampling.temperature] for row in chosen], dtype=torch.float64)
        scaled = tempered(logits[drawn], temperatures.to(logits.device))
        for i, token in zip(drawn, _sample(scaled, chosen), strict=True):
            tokens[i] = token
    for token, row in zip(tokens, rows, strict=True):
        row.took(token)
    return tokens


def _sample(logits: Tensor, rows: Sequence[SequenceSampler]) -> list[int]:
    """From logits (B, V) in float64, by inverting the distribution function at a uniform number per row."""
    cut = [i for i, row in enumerate(rows) if row.sampling.top_k or row.sampling.top_p < 1]
    if cut:
        some = logits[cut]
        least = least_kept(some, [rows[i].sampling for i in cut])
        logits[cut] = some.masked_fill(some < least[:, None], -math.inf)
    mass = logits.softmax(-1).cumsum(-1)
    uniform = mass.new_tensor([row.random.random() for row in rows])[:, None]
    tokens = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)[:, 0]
    # Past the end only by rounding.
    return torch.where(tokens < logits.shape[1], tokens, logits.argmax(-1)).tolist()


def least_kept(logits: Tensor, settings: Sequence[SamplingParams]) -> Tensor:
    """The smallest logit that the cuts keep, (B,): k first, then p of what k kept."""
    vocabulary = logits.shape[1]
    k = torch.tensor([s.top_k or vocabulary for s in settings], device=logits.device)
    k = k.clamp(max=vocabulary)[:, None]
    p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=logits.device)[:, None]
    few = k[k < vocabulary]
    width = min(vocabulary, max(_HEAD, int(few.max()) if len(few) else 0))
    while True:
        top = logits.topk(width).values
        inside = torch.arange(width, device=logits.device) < k
        kept_by_k = top.masked_fill(~inside, -math.inf).logsumexp(-1, keepdim=True)
        total = torch.where(k < vocabulary, kept_by_k, logits.logsumexp(-1, keepdim=True))
        mass = (top - total).exp()
        # A token stays while the mass before it is below p, so the likeliest always does.
        kept = inside & ((mass.cumsum(-1) - mass < p) | (p >= 1))
        count = kept.sum(-1, keepdim=True)
        if width == vocabulary or bool(((k <= width) | (count < width)).all()):
            break
        width = vocabulary
    return top.gather(-1, count - 1)[:, 0]
