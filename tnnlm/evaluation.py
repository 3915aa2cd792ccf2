"""Losses and perplexities in parallel and in recurrent form on the same tokens, and classification scores.

Everything runs in at least float32 without autocast, because bfloat16 rounding would hide the difference
between the two forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnnlm.models.batches import PADDING, LabelledBatch, MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM


class NLL(NamedTuple):
    """Negative log-likelihood, summed over tokens."""

    total: float
    """Sum in nats."""
    tokens: int
    """Number of tokens in the sum."""

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return self.total / self.tokens

    @property
    def ppl(self) -> float:
        """Perplexity, computed by :func:`perplexity`."""
        return perplexity(self.mean)


class Scores(NamedTuple):
    """Scores of classified sequences."""

    total: float
    """Negative log-likelihood in nats, summed over sequences."""
    correct: int
    """Number of sequences that were classified correctly."""
    rows: int
    """Number of sequences."""

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood in nats per sequence."""
        return self.total / self.rows

    @property
    def accuracy(self) -> float:
        """Share of sequences that were classified correctly."""
        return self.correct / self.rows


def perplexity(nats_per_token: float) -> float:
    """Return the exponential of the loss; infinity if it would overflow or the loss is NaN."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return bits per byte, which are comparable across tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token


def ppl_gap(parallel: float, recurrent: float) -> float:
    """Return the signed relative difference of two perplexities, (recurrent - parallel) / parallel."""
    return (recurrent - parallel) / parallel


@torch.no_grad()
def parallel_nll(model: CausalLM, rows: Tensor, counted: int | None = None) -> NLL:
    """Return the NLL of tokens 1 .. L given their predecessors, computed in one parallel forward pass.

    Args:
        model: Causal language model.
        rows: Token ids (B, L + 1), with ``PADDING`` at the end of shorter rows.
        counted: Number of rows to score, from the first; the others pad the batch. None scores all.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return _score(model(rows[:, :-1].clamp(min=0))[:counted], rows[:counted, 1:])


@torch.no_grad()
def recurrent_nll(converted: CausalLM, rows: Tensor, chunk: int, counted: int | None = None) -> NLL:
    """Return the NLL of tokens 1 .. L given their predecessors, computed by running the recurrence.

    Args:
        converted: Causal language model in recurrent form.
        rows: Token ids (B, L + 1), with ``PADDING`` at the end of shorter rows.
        chunk: Tokens per prefill; the state is carried from chunk to chunk.
        counted: Number of rows to score, from the first; the others pad the batch. None scores all.
    """
    parts = []
    with torch.autocast(rows.device.type, enabled=False):
        state = converted.init_state(rows.shape[0])
        for start in range(0, rows.shape[1] - 1, chunk):
            part = rows[:, start : start + chunk + 1]
            logits, state = converted.prefill(part[:, :-1].clamp(min=0), state)
            parts.append(_score(logits[:counted], part[:counted, 1:]))
    return add(parts)


@torch.no_grad()
def masked_nll(model: MaskedLM, batch: MaskedBatch, counted: int | None = None) -> NLL:
    """Return the NLL of the masked tokens of a batch.

    Args:
        model: Masked language model.
        batch: Token ids with the positions and original ids of the masked tokens.
        counted: Number of rows to score, from the first; the others pad the batch. None scores all.
    """
    with torch.autocast(batch.tokens.device.type, enabled=False):
        return _score(model(batch.tokens, batch.positions)[:counted], batch.targets[:counted])


def add(parts: Iterable[NLL]) -> NLL:
    """Return the sum of several NLLs."""
    scored = list(parts)
    return NLL(sum(nll.total for nll in scored), sum(nll.tokens for nll in scored))


@torch.no_grad()
def class_scores(model: nn.Module, batch: LabelledBatch, counted: int | None = None) -> Scores:
    """Return the scores of a classifier on a batch of sequences.

    Args:
        model: Module that returns logits (B, C) for (tokens, lengths), with C classes.
        batch: Sequences with their lengths and labels.
        counted: Number of rows to score, from the first; the others pad the batch. None scores all.
    """
    with torch.autocast(batch.tokens.device.type, enabled=False):
        logits = model(batch.tokens, batch.lengths)[:counted]
    labels = batch.labels[:counted]
    total = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    return Scores(float(total), int((logits.argmax(-1) == labels).sum()), len(labels))


def _score(logits: Tensor, targets: Tensor) -> NLL:
    # Losses in float32 are summed in float64, because the difference of two sums is reported.
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.flatten(),
        reduction="none",
        ignore_index=PADDING,
    )
    return NLL(float(losses.double().sum()), int((targets != PADDING).sum()))
