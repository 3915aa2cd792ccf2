"""Exchange of a split sequence for split channels between processes, by one all-to-all.

A convolution needs all tokens of a channel but no other channel, everything else in a model all channels of a
token but no other token. Processes that hold shards of a sequence therefore exchange them for shards of the
channels around each convolution, as DeepSpeed-Ulysses (arXiv 2309.14509) does around attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContextGroup:
    """Processes that share the sequences of a batch; process c of C holds the c-th of C equal shards."""

    rank: int = 0
    """Number of this process in the group."""
    size: int = 1
    """Number of processes in the group, C."""
    processes: dist.ProcessGroup | None = None
    """Group of ``torch.distributed``; None for the default group."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextGroup:
        """Return the group itself: the copy of a model communicates with the same processes."""
        return self

    def channels(self, total: int) -> slice:
        """Return the channels of this process out of ``total``; the first processes may have one more."""
        counts = self._counts(total)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def to_channels(self, x: Tensor) -> Tensor:
        """Exchange a shard of the sequence, (B, L / C, E), for all tokens of this process's channels.

        Every process of the group must call it, with inputs of one shape. It is differentiable: its gradient
        is the inverse exchange, :meth:`to_tokens`.

        Returns:
            The sequence (B, L, E') in the E' channels ``channels(E)``, in the memory layout (E', B, L).
        """
        counts = self._counts(x.shape[2])
        own = counts[self.rank]
        parts = _AllToAll.apply(x.permute(2, 0, 1), counts, [own] * self.size, self.processes)
        # (C, E', B, L / C) -> (E', B, C, L / C)
        return parts.unflatten(0, (self.size, own)).permute(1, 2, 0, 3).flatten(2).permute(1, 2, 0)

    def to_tokens(self, y: Tensor, total: int) -> Tensor:
        """Exchange all tokens of this process's channels, (B, L, E'), for its shard of the sequence.

        Args:
            y: Sequence in the channels ``channels(total)``.
            total: Number of channels, E.

        Returns:
            The shard (B, L / C, E), in the memory layout (E, B, L / C).
        """
        counts = self._counts(total)
        # (E', B, C, L / C) -> (C, E', B, L / C)
        parts = y.permute(2, 0, 1).unflatten(2, (self.size, -1)).permute(2, 0, 1, 3).flatten(0, 1)
        shard = _AllToAll.apply(parts, [counts[self.rank]] * self.size, counts, self.processes)
        return shard.permute(1, 2, 0)

    def _counts(self, total: int) -> list[int]:
        """Return the number of channels of every process."""
        return [total // self.size + (rank < total % self.size) for rank in range(self.size)]


class _AllToAll(torch.autograd.Function):
    """Send consecutive parts of a tensor, along its first dimension, to the processes of a group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], processes: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.processes = sent, received, processes
        return _exchange(x, sent, received, processes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.processes), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], processes: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=processes)
    return out
