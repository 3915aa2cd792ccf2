"""Batches of the tasks; causal models train on plain tensors, or on answers only."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PADDING = -1
"""Token id at the end of a row of a causal model that is shorter than the others; it is not scored."""


def unscored(tokens: Tensor) -> Tensor:
    """Return token ids as a row contains them where they are inputs, but not scored as targets.

    Every negative entry of a row is not scored: -1 is ``PADDING``, and -2 - t is the token t. Applied twice,
    the function returns the ids.
    """
    return -2 - tokens


def inputs_of(rows: Tensor) -> Tensor:
    """Return the token ids that a model reads from rows: tokens that are not scored, and 0 for padding."""
    return rows.where(rows >= 0, unscored(rows)).clamp(min=0)


class AnswerBatch(NamedTuple):
    """Batch of a causal model of which some tokens are scored, such as the answers of conversations."""

    rows: Tensor
    """Token ids (B, L + 1), inputs and targets in one tensor. Shorter rows are padded at the end with any
    token, which is not scored."""
    mask: Tensor
    """Whether each target, ``rows[:, 1:]``, is scored, (B, L)."""
    divisor: float | None = None
    """Number that divides the summed loss, so that the mean over the batches of an optimizer step and over
    all ranks is the mean over the scored tokens of the step: their number divided by that of the batches.
    None divides by the number of scored tokens of the batch."""

    @property
    def marked(self) -> Tensor:
        """Rows (B, L + 1) whose targets that are not scored are encoded by :func:`unscored`."""
        marked = unscored(self.rows)
        marked[:, 1:] = self.rows[:, 1:].where(self.mask, marked[:, 1:])
        return marked


class MaskedBatch(NamedTuple):
    """Batch for masked language modelling, with M tokens to predict in each row."""

    tokens: Tensor
    """Input token ids after masking, (B, L)."""
    positions: Tensor
    """Positions of the tokens to predict, (B, M)."""
    targets: Tensor
    """Original token ids at these positions, (B, M)."""


class LabelledBatch(NamedTuple):
    """Batch of sequences, or pairs of sequences, and their class labels."""

    tokens: Tensor
    """Token ids (B, L), or (B, 2, L) for pairs. Shorter rows are padded at the end with any token."""
    lengths: Tensor
    """Number of tokens per sequence, (B,), or (B, 2) for pairs; at least 1."""
    labels: Tensor
    """Class index of each sequence or pair, (B,)."""
