"""Batches of the masked and classification tasks; causal models train on plain tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PADDING = -1
"""Token id at the end of a row of a causal model that is shorter than the others; it is not scored."""


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
