"""Perplexity by the parallel form and by really running the recurrence, over the same tokens.

Everything in float32 or wider, without autocast: parity of the two forms must not drown in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnnlm.models.batches import LabelledBatch, MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM


class NLL(NamedTuple):
    """Negative log-likelihood in nats, and how many tokens it is summed over."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens

    @property
    def ppl(self) -> float:
        """Perplexity, as :func:`perplexity` has it."""
        return perplexity(self.mean)


class Scores(NamedTuple):
    """Of classified sequences: negative log-likelihood in nats, how many were right, how many there were."""

    total: float
    correct: int
    rows: int

    @property
    def mean(self) -> float:
        """Nats per sequence."""
        return self.total / self.rows

    @property
    def accuracy(self) -> float:
        """Share that was right."""
        return self.correct / self.rows


def perplexity(nats_per_token: float) -> float:
    """The exponential; infinite where it overflows, and for NaN."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte of text: comparable across tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token


def ppl_gap(parallel: float, recurrent: float) -> float:
    """Relative difference of the two perplexities, signed: (recurrent - parallel) / parallel."""
    return (recurrent - parallel) / parallel


@torch.no_grad()
def parallel_nll(model: CausalLM, rows: Tensor, counted: int | None = None) -> NLL:
    """Score rows (B, L + 1) by one parallel pass: tokens 1..L given those before.

    ``counted``: only the first so many rows count; the others are there to fill the batch.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return _score(model(rows[:, :-1])[:counted], rows[:counted, 1:])


@torch.no_grad()
def recurrent_nll(converted: CausalLM, rows: Tensor, chunk: int, counted: int | None = None) -> NLL:
    """Score rows (B, L + 1) by the recurrence, in chunks that carry the state across their borders.

    ``counted``: as for :func:`parallel_nll`.
    """
    parts = []
    with torch.autocast(rows.device.type, enabled=False):
        state = converted.init_state(rows.shape[0])
        for start in range(0, rows.shape[1] - 1, chunk):
            part = rows[:, start : start + chunk + 1]
            logits, state = converted.prefill(part[:, :-1], state)
            parts.append(_score(logits[:counted], part[:counted, 1:]))
    return add(parts)


@torch.no_grad()
def masked_nll(model: MaskedLM, batch: MaskedBatch, counted: int | None = None) -> NLL:
    """Score the tokens of a batch that are to be guessed.

    ``counted``: as for :func:`parallel_nll`.
    """
    with torch.autocast(batch.tokens.device.type, enabled=False):
        return _score(model(batch.tokens, batch.positions)[:counted], batch.targets[:counted])


def add(parts: Iterable[NLL]) -> NLL:
    """The sum of several."""
    scored = list(parts)
    return NLL(sum(nll.total for nll in scored), sum(nll.tokens for nll in scored))


@torch.no_grad()
def class_scores(model: nn.Module, batch: LabelledBatch, counted: int | None = None) -> Scores:
    """Score the classes of a batch of whole sequences, for logits (B, C) of (tokens, lengths).

    ``counted``: as for :func:`parallel_nll`.
    """
    with torch.autocast(batch.tokens.device.type, enabled=False):
        logits = model(batch.tokens, batch.lengths)[:counted]
    labels = batch.labels[:counted]
    total = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    return Scores(float(total), int((logits.argmax(-1) == labels).sum()), len(labels))


def _score(logits: Tensor, targets: Tensor) -> NLL:
    # Row by row in float32, summed in float64: the gap of two sums is what is looked at.
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.flatten(),
        reduction="none",
    )
    return NLL(float(losses.double().sum()), targets.numel())
