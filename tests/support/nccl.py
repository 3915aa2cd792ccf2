"""Collectives of real processes over gloo, recorded, and refused where NCCL refuses them.

The gradient reducer of DDP and FSDP2 do not take the tensors of :mod:`tests.support.pretend`, so they run on
CPU tensors here. Whether a tensor would be on the GPU is therefore not known; dtype, layout and operator are.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.pretend.tensors import SHAPE_OF_VALUES, TO_HOST, place

DTYPES = {
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
}
"""Dtypes that NCCL communicates."""
GLOO_ONLY = {"monitored_barrier_", "allgather_coalesced_", "recv_any_source_"}
"""Collectives that NCCL lacks."""
LOCAL = {"wait_tensor", "_wrap_tensor_autograd"}
"""Operators of the same namespaces that communicate nothing."""


class AsNccl(TorchDispatchMode):
    """Record collectives, those of C++ code too, and host synchronisations; refuse what NCCL refuses.

    Groups that are created with ``backend="gloo"`` may communicate anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: Callable[[], int] = lambda: -1
        """Returns the number of optimizer steps done."""
        self.collectives: Counter[tuple[int, str, str, str]] = Counter()
        """Collectives as (step, name, dtype, device)."""
        self.syncs: Counter[tuple[int, str, str]] = Counter()
        """Operators for whose result the host would wait as (step, name, place)."""
        self._gloo: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its shard comes here again
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in LOCAL:
            self._check(name, args)
        elif name in TO_HOST | SHAPE_OF_VALUES:
            self.syncs[self.step(), name, place()] += 1
        return func(*args, **(kwargs or {}))

    def _check(self, name: str, args: Any) -> None:
        groups = (x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        if any(dist.ProcessGroup.unbox(group).group_name in self._gloo for group in groups):
            return
        if name in GLOO_ONLY:
            raise RuntimeError(f"ProcessGroupNCCL does not support {name}: {place()}")
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        self.collectives[self.step(), name, str(tensors[0].dtype), tensors[0].device.type] += 1
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                raise RuntimeError(f"Unconvertible NCCL type {tensor.dtype}: {name} at {place()}")
            if tensor.layout != torch.strided or not tensor.is_contiguous():
                raise RuntimeError(f"Tensors must be contiguous and dense: {name} at {place()}")

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[AsNccl]:
        """Watch this thread inside a ``with`` block, and remember the groups of gloo."""
        made = dist.new_group

        def new_group(*args: Any, backend: str | None = None, **more: Any) -> Any:
            group = made(*args, backend=backend, **more)
            if backend == "gloo" and isinstance(group, dist.ProcessGroup):
                self._gloo.add(group.group_name)
            return group

        with mock.patch.object(dist, "new_group", new_group), self:
            yield self
