"""The synthetic memory tasks of the RTF paper (arXiv 2405.06147, section 4.2), drawn anew for every batch.

Copying (Arjovsky et al., arXiv 1511.06464): symbols, then blanks, then as many markers as symbols, at
which the symbols are to be told in order. Delay (Gu et al., arXiv 2206.12037): a white signal below a
cut-off frequency, to be given out again some steps later.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLANK = 0
"""token id; the marker is the last id, symbols are all between"""


class Batch(NamedTuple):
    """Inputs (B, L), and what the last positions are to give, (B, at most L)."""

    inputs: Tensor
    targets: Tensor


def copying(seed: int, batch: int, *, rows: int, symbols: int, vocab_size: int, blanks: int = 0) -> Batch:
    """One batch of the copying task: the same for the same arguments, whatever was drawn before.

    Args:
        seed: of the whole stream.
        batch: number of the batch in it.
        rows: B.
        symbols: to remember, M.
        vocab_size: of blank, marker and symbols together, at least 3.
        blanks: between the symbols and the first marker.

    Returns:
        token ids (B, 2 M + ``blanks``), and the symbols (B, M), targets of the last M positions.

    Raises:
        ValueError: for a vocabulary without symbols.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size {vocab_size}: blank and marker leave no symbol")
    drawn = _stream(seed, batch).integers(BLANK + 1, vocab_size - 1, size=(rows, symbols))
    told = torch.from_numpy(drawn)
    rest = torch.full((rows, blanks + symbols), BLANK)
    rest[:, blanks:] = vocab_size - 1
    return Batch(torch.cat((told, rest), dim=1), told)


def delay(
    seed: int, batch: int, *, rows: int, length: int, lag: int, cutoff: float = 0.25, rms: float = 0.5
) -> Batch:
    """One batch of the delay task: the same for the same arguments, whatever was drawn before.

    Args:
        seed: of the whole stream.
        batch: number of the batch in it.
        rows: B.
        length: L.
        lag: steps of delay, below L.
        cutoff: highest frequency of the signal, in cycles per step, at most 0.5.
        rms: of the signal before its first value is taken off all of them, so that it starts at zero.

    Returns:
        signals (B, L) in float32, and the same ``lag`` steps later, (B, L), zero before.

    Raises:
        ValueError: if nothing of a signal is told again, or no frequency is below the cut-off.
    """
    if not 0 < lag < length:
        raise ValueError(f"lag {lag}: must be from 1 to below the length, {length}")
    frequencies = np.fft.rfftfreq(length)
    kept = (frequencies > 0) & (frequencies <= cutoff)
    if not kept.any():
        raise ValueError(f"cutoff {cutoff}: below the lowest frequency, {frequencies[1]:g}")
    noise = _stream(seed, batch).standard_normal((rows, length))
    signal = np.fft.irfft(np.fft.rfft(noise) * kept, n=length)
    # Every frequency but that of Nyquist counts twice.
    share = np.where(frequencies[kept] < 0.5, 2, 1).sum() / length
    signal *= rms / np.sqrt(share)
    inputs = torch.from_numpy(signal - signal[:, :1]).float()
    return Batch(inputs, torch.nn.functional.pad(inputs[:, :-lag], (lag, 0)))


def _stream(seed: int, batch: int) -> np.random.Generator:
    return np.random.default_rng((seed, batch))
