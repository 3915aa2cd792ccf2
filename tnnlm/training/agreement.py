"""Means and decisions of all ranks after every optimizer step, for which no host waits for its GPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Replace the values of a tensor by their means over all ranks, and return it; call it on all ranks.

    ``Strategy.reduce`` begins with a barrier, in which every host waits for its GPU.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


class HostAgreement:
    """Decision of all ranks over a group of gloo, so that no host waits for its GPU.

    ``Strategy.reduce_boolean_decision`` reduces on the GPUs, and its answer is known only when all work that
    was queued before has finished. Use that for rare decisions, and this for those of every step. Lightning
    also creates a group of gloo, for its barrier around ``prepare_data``.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def any(self, strategy: Strategy, decision: bool) -> bool:
        """Return whether ``decision`` is true on any rank; call it on all ranks."""
        if strategy.root_device.type == "cpu" or not dist.is_initialized():
            return strategy.reduce_boolean_decision(decision, all=False)
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        votes = torch.tensor(int(decision))
        dist.all_reduce(votes, group=self._group)
        return bool(votes)
