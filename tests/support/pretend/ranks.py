"""Rank 0 of two identical pretended ranks, whose collectives refuse what NCCL refuses."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import lightning.fabric.utilities.distributed as fabric
import lightning.pytorch.strategies.ddp as ddp
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.pretend.tensors import LEDGER, PretendTensor, place

COLLECTIVES: Counter[tuple[str, str, str]] = Counter()
"""Collectives on tensors, as (name, dtype, place)."""


class Replica(nn.Module):
    """Stand-in for DistributedDataParallel: gradients of identical ranks equal their mean."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module
        self.require_backward_grad_sync = self.static_graph = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do nothing."""
        yield


def check(name: str, *tensors: Tensor, group: Any = None) -> None:
    """Count a collective of the default group, and refuse tensors on the CPU.

    Raises:
        RuntimeError: If a tensor is on the CPU; the message is that of NCCL.
    """
    for tensor in tensors:
        COLLECTIVES[name, str(tensor.dtype), place()] += 1
        if not isinstance(tensor, PretendTensor) and group is not HOST:
            raise RuntimeError(f"No backend type associated with device type cpu: {name} at {place()}")


class Host:
    """Group of gloo, which takes CPU tensors."""

    def monitored_barrier(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


HOST = Host()


def all_reduce(tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> None:
    """Reduce over two equal values."""
    check("all_reduce", tensor, group=group)
    if op in (None, dist.ReduceOp.SUM):
        tensor.mul_(2)


def all_gather(outputs: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> None:
    """Gather two equal values."""
    check("all_gather", tensor, *outputs, group=group)
    for output in outputs:
        output.copy_(tensor)


def new_group(*_: Any, backend: str | None = None, **__: Any) -> Any:
    """Return the group of the backend."""
    return HOST if backend == "gloo" else None


@contextlib.contextmanager
def two_ranks() -> Iterator[None]:
    """Run as rank 0 of two, started as by torchrun, inside a ``with`` block."""
    place_of_rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in place_of_rank.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_RUN_ID="pretended")
    replaced = {
        "is_initialized": lambda: True,
        "init_process_group": lambda *_, **__: None,
        "destroy_process_group": lambda *_, **__: None,
        "new_group": new_group,
        "get_rank": lambda group=None: 0,
        "get_world_size": lambda group=None: 2,
        "get_backend": lambda group=None: "nccl",
        "barrier": lambda *_, **__: LEDGER.sync("barrier"),
        "monitored_barrier": lambda *_, **__: None,
        "broadcast_object_list": lambda *_, **__: None,
        "broadcast": lambda tensor, *_, group=None, **__: check("broadcast", tensor, group=group),
        "all_reduce": all_reduce,
        "all_gather": all_gather,
    }
    with contextlib.ExitStack() as patches:
        for name, value in replaced.items():
            patches.enter_context(mock.patch.object(dist, name, value))
        patches.enter_context(mock.patch.object(ddp, "DistributedDataParallel", Replica))
        patches.enter_context(mock.patch.object(ddp, "_register_ddp_comm_hook"))
        patches.enter_context(mock.patch.object(fabric, "_distributed_is_initialized", return_value=True))
        yield
