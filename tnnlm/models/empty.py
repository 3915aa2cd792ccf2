"""Models without weights, to be filled from a file or to be counted: they are built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM = (Tensor.normal_, Tensor.uniform_)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the meta device, without initialising their weights.

    Random operators of meta tensors are decompositions in Python, whose first call imports PyTorch's compiler
    (``torch._dynamo``): a second of the start of every command that decodes.
    """
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Mode in which functions that initialise a tensor return it unchanged."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _RANDOM or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
