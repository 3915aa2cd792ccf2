"""Convolution to convert, its recurrence, and the relative error between their taps."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.conversion.linalg import channel_blocks, power_of_two, row_scales
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.ops.recurrence import Params


class LayerConversion(NamedTuple):
    """Recurrence of one layer, with the method that produced it and the reason for this method."""

    params: Params
    method: str
    reason: str


class Source(NamedTuple):
    """Convolution to convert: its taps, and properties of its kernel."""

    k: Tensor
    """Taps (E, T), float32 or float64, all of which the recurrence is meant to match."""
    decay: Tensor | None = None
    """Decay per channel, (E,), that ETSC moves into the poles."""
    own: Params | None = None
    """Exact recurrence that the kernel defines, if any, for ``companion`` and ``auto``."""
    finite: bool = False
    """Whether the kernel is zero from lag T on, even if its last taps are large."""
    longer: Tensor | None = None
    """Taps at more lags, (E, T'), T' >= T; None if none past lag T are known."""
    reach: int = 0
    """Number of lags on which the tolerance must hold too, at least T', with zeros from lag T' on; 0: it must
    hold on T lags only, because the horizon was set below the length of the kernel."""


CLOSER = "raise the tolerance, or use --method auto or window, --window-taps or --poles channel"
"""Remedy if ``balanced`` can't meet a tolerance, with the methods that suit every kernel first."""
SAMPLE = 8
"""Number of channels that are tried first where all of them may take minutes."""


def sampled(source: Source) -> Source:
    """Return ``SAMPLE`` channels, or all if there are fewer, from the first to the last in equal distances.

    The recurrence that the kernel defines is omitted.
    """
    channels = len(source.k)
    if channels <= SAMPLE:
        return source._replace(own=None)
    chosen = torch.linspace(0, channels - 1, SAMPLE, device=source.k.device).round().long()
    decay, longer = (None if part is None else part[chosen] for part in (source.decay, source.longer))
    return source._replace(k=source.k[chosen], decay=decay, longer=longer, own=None)


class ToleranceError(UserError):
    """Tolerance that a method can't meet; ``reached`` is the smallest relative error it reached."""

    def __init__(self, reason: str, remedy: str, reached: float) -> None:
        super().__init__(reason, remedy)
        self.reached = reached


def relative_error(k: Tensor, params: Params, length: int = 0, *, each: bool = False) -> float:
    """Return the relative error ||k - k^|| / ||k|| of stored parameters.

    Args:
        k: Taps (E, T).
        params: Parameters of the recurrence with the effective taps k^.
        length: Number of lags to compare, with zeros past the last tap; T if it is smaller.
        each: Whether to return the largest error of a channel instead of the error of all channels.

    Returns:
        Error, 0 if taps and recurrence are both zero, infinity if only the taps are zero or the recurrence
        overflows. It is never NaN.
    """
    length = max(length, k.shape[1])
    common = power_of_two(k)
    squares = []
    for part, block in channel_blocks(k):
        scale = row_scales(block) if each else common
        whole = torch.nn.functional.pad(block, (0, length - k.shape[1]))
        difference = params.channels_of(part).difference(whole)
        squares.append(torch.stack([(x / scale).square().sum(1) for x in (difference, whole)]))
    missed, energy = torch.cat(squares, dim=1)
    if not each:
        missed, energy = missed.sum(), energy.sum()
    error = torch.where(missed == 0, 0.0, missed / energy).sqrt().max()
    return float(error) if bool(torch.isfinite(error)) else math.inf


def largest_error(source: Source, params: Params, *, each: bool = False) -> tuple[float, int]:
    """Return the larger of the relative errors on the horizon and on ``source.reach`` lags, and those lags.

    Arguments are those of :func:`relative_error`.
    """
    found = [(relative_error(source.k, params, each=each), source.k.shape[1])]
    if source.reach:
        known = source.k if source.longer is None else source.longer
        found.append((relative_error(known, params, source.reach, each=each), source.reach))
    return max(found)


def moved(kernel: Kernel, device: torch.device | None) -> Kernel:
    """Return a copy of a kernel on a device, or the kernel itself if ``device`` is None."""
    return kernel if device is None else copy.deepcopy(kernel).to(device)
