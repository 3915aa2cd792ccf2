"""Losses and perplexities in parallel and in recurrent form on the same tokens, and classification scores.

Everything runs in at least float32 without autocast, because bfloat16 rounding would hide the difference
between the two forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tnnlm.models.batches import LabelledBatch, MaskedBatch, inputs_of
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


class RowLosses(NamedTuple):
    """Negative log-likelihood of every row of a batch, for differences that are paired by row."""

    nats: Tensor
    """Sums in nats over the tokens of each row, (B,) in float64."""
    tokens: Tensor
    """Number of tokens in each sum, (B,)."""

    @property
    def nll(self) -> NLL:
        """Sum over all rows."""
        return NLL(float(self.nats.sum()), int(self.tokens.sum()))

    @classmethod
    def join(cls, parts: Sequence[RowLosses]) -> RowLosses:
        """Return the rows of several batches in order."""
        nats, tokens = zip(*parts, strict=True)
        return cls(torch.cat(nats), torch.cat(tokens))


class PairedGap(NamedTuple):
    """Relative difference of two perplexities that are measured on the same rows."""

    gap: float
    """Signed relative difference."""
    standard_error: float | None
    """Standard error of the difference over the rows; None for a single row."""


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


def paired_gap(reference: RowLosses, other: RowLosses) -> PairedGap:
    """Return the relative difference of two perplexities, with the standard error of the paired difference.

    With d_r the difference in nats of row r and n_r its tokens, the mean difference is d = sum d_r / sum n_r,
    a ratio of sums with the standard error sqrt(R / (R - 1) sum (d_r - d n_r)^2) / sum n_r over R rows. Rows
    are easy or hard for both models alike, so that it is far smaller than the error of either perplexity. The
    relative difference is exp(d) - 1, and its standard error exp(d) times that of d.

    Args:
        reference: Losses of the model to compare with.
        other: Losses of the other model on the same rows.
    """
    tokens, rows = reference.tokens.double(), len(reference.tokens)
    differences = other.nats - reference.nats
    mean = float(differences.sum() / tokens.sum())
    gap = math.expm1(mean) if mean < 700 else math.inf
    if rows == 1 or not math.isfinite(gap):
        return PairedGap(gap, None)
    scatter = float((differences - mean * tokens).square().sum()) * rows / (rows - 1)
    return PairedGap(gap, (1 + gap) * math.sqrt(scatter) / float(tokens.sum()))


def parallel_nll(model: CausalLM, rows: Tensor, counted: int | None = None) -> NLL:
    """Return the NLL of tokens 1 .. L given their predecessors, computed in one parallel forward pass.

    Args:
        model: Causal language model.
        rows: Token ids (B, L + 1), of which negative ones are padding or tokens that are not scored; see
            :func:`~tnnlm.models.batches.unscored`.
        counted: Number of rows to score, from the first; the others pad the batch. None scores all.
    """
    return parallel_losses(model, rows, counted).nll


@torch.no_grad()
def parallel_losses(model: CausalLM, rows: Tensor, counted: int | None = None) -> RowLosses:
    """Return the losses of :func:`parallel_nll` by row."""
    with torch.autocast(rows.device.type, enabled=False):
        return _score(model(inputs_of(rows[:, :-1]))[:counted], rows[:counted, 1:])


def recurrent_nll(converted: CausalLM, rows: Tensor, chunk: int, counted: int | None = None) -> NLL:
    """Return the NLL of tokens 1 .. L given their predecessors, computed by running the recurrence.

    Args:
        converted: Causal language model in recurrent form.
        rows: Token ids (B, L + 1), of which negative ones are padding or tokens that are not scored; see
            :func:`~tnnlm.models.batches.unscored`.
        chunk: Tokens per prefill; the state is carried from chunk to chunk.
        counted: Number of rows to score, from the first; the others pad the batch. None scores all.
    """
    return recurrent_losses(converted, rows, chunk, counted).nll


@torch.no_grad()
def recurrent_losses(converted: CausalLM, rows: Tensor, chunk: int, counted: int | None = None) -> RowLosses:
    """Return the losses of :func:`recurrent_nll` by row."""
    parts = []
    with torch.autocast(rows.device.type, enabled=False):
        state = converted.init_state(rows.shape[0])
        for start in range(0, rows.shape[1] - 1, chunk):
            part = rows[:, start : start + chunk + 1]
            logits, state = converted.prefill(inputs_of(part[:, :-1]), state)
            parts.append(_score(logits[:counted], part[:counted, 1:]))
    nats, tokens = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
    return RowLosses(nats, tokens)


@torch.no_grad()
def step_difference(parallel: CausalLM, converted: CausalLM, rows: Tensor, steps: int) -> float:
    """Return the largest difference in nats between the losses of a model's recurrent and parallel form.

    Args:
        parallel: Model that computes all positions in one forward pass.
        converted: Recurrent form of this model.
        rows: Token ids (B, L + 1), of which negative ones are padding or tokens that are not scored; see
            :func:`~tnnlm.models.batches.unscored`.
        steps: Number of last tokens that are decoded one at a time; those before them are prefilled.
    """
    tokens, before = inputs_of(rows[:, :-1]), max(0, rows.shape[1] - 1 - steps)
    with torch.autocast(rows.device.type, enabled=False):
        state, parts = converted.init_state(len(rows)), []
        if before:
            logits, state = converted.prefill(tokens[:, :before], state)
            parts.append(logits)
        for position in range(before, tokens.shape[1]):
            logits, state = converted.step(tokens[:, position], state)
            parts.append(logits.unsqueeze(1))
        own, others = (token_losses(found, rows[:, 1:]) for found in (torch.cat(parts, 1), parallel(tokens)))
    return float((own - others).abs().max())


@torch.no_grad()
def masked_nll(model: MaskedLM, batch: MaskedBatch, counted: int | None = None) -> NLL:
    """Return the NLL of the masked tokens of a batch.

    Args:
        model: Masked language model.
        batch: Token ids with the positions and original ids of the masked tokens.
        counted: Number of rows to score, from the first; the others pad the batch. None scores all.
    """
    with torch.autocast(batch.tokens.device.type, enabled=False):
        return _score(model(batch.tokens, batch.positions)[:counted], batch.targets[:counted]).nll


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


def _score(logits: Tensor, targets: Tensor) -> RowLosses:
    # Losses in float32 are summed in float64, because the difference of two sums is reported.
    return RowLosses(token_losses(logits, targets).double().sum(1), (targets >= 0).sum(1))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses in nats (B, L) of targets (B, L) for logits (B, L, V), zero for negative ones."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.clamp(min=-1).flatten(),
        reduction="none",
        ignore_index=-1,
    )
    return losses.view(targets.shape)
