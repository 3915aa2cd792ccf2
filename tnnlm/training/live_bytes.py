"""Count of the bytes of live tensors, for steps over fake tensors, which have shapes but no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of the storages that operators return until they are freed.

    Views share the storage of their base and count once. A number that Python reads from a fake tensor is 1,
    because fake tensors have no values.
    """

    def __init__(self, work: Callable[[Any, tuple[Any, ...]], int]) -> None:
        """Start with nothing alive.

        Args:
            work: Function of an operator and its arguments that returns the bytes which the operator holds
                only while it runs, beyond the tensors that it returns.
        """
        super().__init__()
        self.now = 0
        """Bytes that are alive."""
        self.peaks: dict[str, int] = {}
        """Largest number of live bytes in each phase, by its name."""
        self.phase = "build"
        """Name of the phase that later operators belong to."""
        self._work = work
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count the storages of its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for part in tree_iter(out):
            if isinstance(part, Tensor):
                self._add(part.untyped_storage())
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now + self._work(func, args))
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def free(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, free)
        self.now += size


@contextmanager
def counted(work: Callable[[Any, tuple[Any, ...]], int]) -> Iterator[LiveBytes]:
    """Make the tensors of a ``with`` block fake and count their bytes; see :class:`LiveBytes`."""
    with FakeTensorMode(), LiveBytes(work) as live:
        yield live
