"""State of the multirate recurrence, and the turns of T tokens that its sequences are divided into.

Dimensions: B batch, L length, E channels, P latest inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MultirateState(NamedTuple):
    """Decoding state of one convolution, which has a fixed size and is never modified in place.

    The tokens of a sequence are divided into turns of T tokens.
    """

    recent: Tensor
    """Last P inputs, newest first, (B, P, E)."""
    pages: tuple[Tensor, ...]
    """Ring buffer of the inputs of earlier turns, one page (B, T, E) each. A new turn replaces one page, and
    shares the others with the state before it."""
    ahead: Tensor
    """Contributions at lags from P on to the outputs of the current turn, (B, T, E)."""
    coming: Tensor
    """Contributions at lags from P on to the outputs of the next turn, (B, T, E), for the first channels, and
    zero for the others."""
    clock: Tensor
    """Number of processed tokens of the current turn, from 0 to T - 1, number of channels of ``coming`` that
    are complete, and index of the oldest page, (B, 3). It has the dtype of the other tensors, which
    represents these numbers exactly, so that all tensors of a state have one dtype."""

    def check(self) -> None:
        """Check the clock, which a damaged file may have with numbers that no sequence leads to.

        Raises:
            ValueError: If a number is negative, too large, or not a whole one.
        """
        # A kernel that reaches the latest inputs only has no turns, and a clock of zeros.
        limits = [max(1, self.ahead.shape[1]), self.ahead.shape[2] + 1, max(1, len(self.pages))]
        clock = self.clock
        if not bool(((clock >= 0) & (clock < clock.new_tensor(limits)) & (clock == clock.round())).all()):
            raise ValueError("a clock has numbers that no sequence leads to")

    def in_order(self) -> Tensor:
        """Return the inputs of all pages, oldest first, (B, N, E)."""
        oldest = self.clock[:, 2].long()
        pages = torch.stack(self.pages, dim=1)
        rows, count = pages.shape[:2]
        order = (oldest[:, None] + torch.arange(count, device=oldest.device)) % count
        return pages[torch.arange(rows, device=oldest.device)[:, None], order].flatten(1, 2)

    def next_turn(self, ended: dict[int, list[int]]) -> MultirateState:
        """Return the state with a new turn in the rows that ended one.

        Args:
            ended: Oldest page, which is replaced -> rows.
        """
        recent, ahead, coming, clock = self.recent, self.ahead, self.coming, self.clock.clone()
        turn, pages = ahead.shape[1], list(self.pages)
        for oldest, rows in ended.items():
            start = clock.new_tensor([0, 0, (oldest + 1) % len(pages)])
            if len(rows) == len(clock):
                pages[oldest] = recent[:, :turn].flip(1)
                ahead, coming = coming, torch.zeros_like(coming)
                clock[:] = start
                break
            index = torch.tensor(rows, device=clock.device)
            pages[oldest] = pages[oldest].index_copy(0, index, recent[index, :turn].flip(1))
            ahead = ahead.index_copy(0, index, coming[index])
            coming = coming.index_fill(0, index, 0)
            clock[index] = start
        return MultirateState(recent, tuple(pages), ahead, coming, clock)


def as_pages(past: Tensor, oldest: Tensor, turn: int) -> tuple[Tensor, ...]:
    """Return inputs (B, N, E), oldest first, as pages of ``turn`` tokens, the oldest at index ``oldest``."""
    pages = past.unflatten(1, (-1, turn))
    rows, count = pages.shape[:2]
    order = (torch.arange(count, device=past.device) - oldest[:, None]) % count
    ring = pages[torch.arange(rows, device=past.device)[:, None], order]
    # Clones, so that a page that is replaced frees its memory.
    return tuple(page.clone() for page in ring.unbind(1))


def rows_from(x: Tensor, first: Tensor, count: int) -> Tensor:
    """Return ``count`` consecutive rows of x (B, L, E) from row ``first`` (B,) on, (B, count, E)."""
    index = first[:, None] + torch.arange(count, device=x.device)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
