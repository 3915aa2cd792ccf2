"""What the models of each task train on, beside plain tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskedBatch(NamedTuple):
    """Rows with tokens to be guessed, as many in each."""

    tokens: Tensor
    """(B, L), what the model reads"""
    positions: Tensor
    """(B, M), of those to be guessed"""
    targets: Tensor
    """(B, M), what stood there"""


class LabelledBatch(NamedTuple):
    """Sequences and their classes."""

    tokens: Tensor
    """(B, L); rows shorter than L are padded at their end, with any token; of pairs (B, 2, L)"""
    lengths: Tensor
    """(B,) tokens per row, at least one; of pairs (B, 2)"""
    labels: Tensor
    """(B,)"""
