"""Batched sampling of the next token, with separate parameters and random number generators per row.

The token sampled for a row depends only on its logits, parameters and seed, not on the other rows of the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tnnlm.inference.adjustments import Adjustments
from tnnlm.inference.grammar import GrammarMatcher
from tnnlm.inference.sampling import SamplingParams, tempered

NO_TOKEN = -1
"""Result instead of a token for logits that are not finite."""
_CACHED_ROWS = 8
"""Rows that are sampled together on a CPU, whose numbers in float64 stay in its cache."""
_HEAD = 1024
"""Number of most likely tokens that are sorted first; all are sorted only if these don't reach ``top_p``."""


class SequenceSampler:
    """Sampling parameters, logit adjustments and random number generator of one sequence."""

    def __init__(
        self,
        sampling: SamplingParams,
        vocabulary: int,
        *,
        seed: int | None = None,
        index: int = 0,
        prompt: Sequence[int] = (),
        bias: Mapping[int, float] | None = None,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        """Set up sampling of one sequence.

        Args:
            sampling: Sampling parameters.
            vocabulary: Size of the vocabulary.
            seed: Seed of the random number generator; None takes a random seed.
            index: Index among the sequences that share the seed.
            prompt: Tokens of the prompt, which the repetition penalty applies to.
            bias: Values to add to the logits of tokens: id -> bias.
            matcher: Grammar that the sequence follows.
        """
        self.sampling = sampling
        self._random = np.random.default_rng(None if seed is None else (seed % (1 << 64), index))
        self._uniform: float | None = None
        changes = Adjustments(sampling, vocabulary, prompt=prompt, bias=bias, matcher=matcher)
        self.changes = changes if changes.active else None
        """Changes of the logits; None if there are none."""

    def uniform(self) -> float:
        """Return the random number of the next token, the same one until :meth:`took` is called.

        A step that is repeated because another row failed then samples the same token.
        """
        if self._uniform is None:
            self._uniform = float(self._random.random())
        return self._uniform

    def took(self, token: int) -> None:
        """Update the changes with a sampled token, and continue with the next random number."""
        self._uniform = None
        if self.changes is not None:
            self.changes.took(token)


def sample_batch(logits: Tensor, rows: Sequence[SequenceSampler]) -> list[int | Exception]:
    """Sample one token per row of logits (B, V) and update the penalties.

    A row whose largest logit is not finite gives :data:`NO_TOKEN`. If sampling fails, each row is sampled
    alone, and the rows that fail again give their exception; the others get the tokens of a batch without
    them.
    """
    tokens: list[int | Exception] = []
    try:
        tokens += draw_tokens(logits, rows)
    except Exception:  # of one row at least, which is found below
        tokens += [_draw_alone(logits[i : i + 1], row) for i, row in enumerate(rows)]
    for i, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        if not isinstance(token, Exception) and token != NO_TOKEN:
            try:
                row.took(token)
            except Exception as error:
                tokens[i] = error
    return tokens


def _draw_alone(logits: Tensor, row: SequenceSampler) -> int | Exception:
    try:
        return draw_tokens(logits, [row])[0]
    except Exception as error:
        return error


def draw_tokens(logits: Tensor, rows: Sequence[SequenceSampler]) -> list[int]:
    """Sample one token per row of logits (B, V) without any change to the rows."""
    logits = logits.float()
    if any(row.changes is not None for row in rows):
        logits = logits.clone()
        for changed, row in zip(logits, rows, strict=True):
            if row.changes is not None:
                row.changes.apply(changed)
    best = logits.max(-1)  # the maximum of a row with a NaN is NaN
    # Read at once, because the host waits for a GPU at each reading.
    tokens: list[int] = best.indices.where(best.values.isfinite(), NO_TOKEN).tolist()
    drawn = [i for i, row in enumerate(rows) if tokens[i] != NO_TOKEN and not row.sampling.greedy]
    at_once = _CACHED_ROWS if logits.device.type == "cpu" else max(1, len(drawn))
    for part in (drawn[start : start + at_once] for start in range(0, len(drawn), at_once)):
        chosen = [rows[i] for i in part]
        temperatures = torch.tensor([[row.sampling.temperature] for row in chosen], dtype=torch.float64)
        some = logits if len(part) == len(rows) else logits[part]
        scaled = tempered(some, temperatures.to(logits.device))
        for i, token in zip(part, _sample(scaled, chosen), strict=True):
            # Rounding errors alone can give an index past the end; the most likely token is kept then.
            tokens[i] = token if token < logits.shape[1] else tokens[i]
    return tokens


def _sample(logits: Tensor, rows: Sequence[SequenceSampler]) -> list[int]:
    """Sample from logits (B, V) in float64 by inverse transform sampling with one uniform number per row.

    Rounding errors alone can give V, one past the last token.
    """
    cut = [i for i, row in enumerate(rows) if row.sampling.top_k > 0 or row.sampling.top_p < 1]
    if cut:
        some = logits[cut]
        least = least_kept(some, [rows[i].sampling for i in cut])
        logits[cut] = some.masked_fill(some < least[:, None], -math.inf)
    relative = [math.log(row.sampling.min_p) if row.sampling.min_p > 0 else -math.inf for row in rows]
    if any(bound > -math.inf for bound in relative):  # the largest logit of each row is 0
        logits = logits.masked_fill(logits < logits.new_tensor(relative)[:, None], -math.inf)
    mass = logits.softmax(-1).cumsum(-1)
    uniform = mass.new_tensor([row.uniform() for row in rows])[:, None]
    return torch.searchsorted(mass, uniform * mass[:, -1:], right=True)[:, 0].tolist()


def least_kept(logits: Tensor, settings: Sequence[SamplingParams]) -> Tensor:
    """Return the smallest logit of each row, (B,), that top-k and then top-p keep."""
    vocabulary = logits.shape[1]
    # Limited before it becomes a tensor: a client may send any integer.
    most = [min(s.top_k, vocabulary) if s.top_k > 0 else vocabulary for s in settings]
    k = torch.tensor(most, device=logits.device)[:, None]
    p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=logits.device)[:, None]
    few = k[k < vocabulary]
    width = min(vocabulary, max(_HEAD, int(few.max()) if len(few) else 0))
    while True:
        top = logits.topk(width).values
        inside = torch.arange(width, device=logits.device) < k
        kept_by_k = top.masked_fill(~inside, -math.inf).logsumexp(-1, keepdim=True)
        total = torch.where(k < vocabulary, kept_by_k, logits.logsumexp(-1, keepdim=True))
        mass = (top - total).exp()
        # A token is kept if the mass before it is below p, so the most likely token is always kept.
        kept = inside & ((mass.cumsum(-1) - mass < p) | (p >= 1))
        count = kept.sum(-1, keepdim=True)
        if width == vocabulary or bool(((k <= width) | (count < width)).all()):
            break
        width = vocabulary
    return top.gather(-1, count - 1)[:, 0]
