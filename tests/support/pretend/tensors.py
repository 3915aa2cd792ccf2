"""Tensors that report the device cuda:0 and compute on the CPU, and the ledger of what they did."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten
ROOT = Path(__file__).parents[3]
CALLER = re.compile(
    rf"(?:{re.escape(str(ROOT))}|.*/site-packages)/((?:tnnlm|lightning|torchmetrics|torch/optim)/.*)"
)
"""Files whose code is named as the place of a synchronisation."""
TO_HOST = {"_local_scalar_dense", "is_nonzero", "equal"}
"""Operators that return a Python value, for which the host waits."""
SHAPE_OF_VALUES = {"nonzero", "masked_select", "unique_consecutive", "_unique2"}
"""Operators whose output shape depends on values, for which the host waits."""
MIXED = {"copy_", "_to_copy", "_foreach_copy_", "index", "index_put_", "index_put", "_unsafe_index"}
"""Operators that accept tensors of several devices."""
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "resize_"}
"""Operators without a kernel, besides views."""


class Ledger:
    """Counts of host synchronisations, as (step, kind, place), and of kernel launches by operator."""

    def __init__(self) -> None:
        self.syncs: Counter[tuple[int, str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.step: Callable[[], int] = lambda: -1
        """Returns the number of optimizer steps done."""
        self.captured: list[tuple[Any, Any, Any, Any]] | None = None
        """Operators of the CUDA graph that is being captured, as (operator, args, kwargs, results)."""

    def sync(self, kind: str) -> None:
        """Count a host synchronisation of the calling code.

        Raises:
            RuntimeError: If a CUDA graph is being captured; the message is that of CUDA.
        """
        if self.captured is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind} at {place()}")
        self.syncs[self.step(), kind, place()] += 1


LEDGER = Ledger()


def place() -> str:
    """Return file and line of the innermost frame of the package, Lightning, torchmetrics or torch.optim."""
    frame = sys._getframe(1)
    while frame is not None:
        found = CALLER.match(frame.f_code.co_filename)
        if found:
            return f"{found[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class PretendTensor(Tensor):
    """Tensor on cuda:0 whose values are those of the CPU tensor ``inner``."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda:0",
        )
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> PretendTensor:
        return PretendTensor(inner["inner"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        """Refuse, as a GPU tensor does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        """Return the values, for which the host waits."""
        LEDGER.sync("tolist")
        return self.inner.detach().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = PretendTensor(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied


def execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the inner tensors, count it, and wrap its results on the pretended device.

    Raises:
        RuntimeError: If tensors of both devices meet in an operator that a GPU refuses them in.
    """
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, PretendTensor)]
    others = [x for x in tensors if not isinstance(x, PretendTensor)]
    scalars = torch.Tag.pointwise in func.tags or name.startswith(("_foreach", "_fused", "fill"))
    if ours and name not in MIXED and any(x.dim() or not scalars for x in others):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} at {place()}")
    if name in ("pin_memory", "_pin_memory"):
        return args[0]
    if name == "is_pinned":
        return False
    on_gpu = bool(ours)
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == "cuda"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    launched = _count(func, args, kwargs, ours, on_gpu)
    inner = {id(x.inner): x for x in ours}
    # Below this point PyTorch ignores the mark of a conjugate that is not computed yet.
    computes = aten.conj_physical.default if name == "_conj" else func
    args_in, kwargs_in = tree_map(_unwrap, args), tree_map(_unwrap, kwargs)
    out = computes(*args_in, **kwargs_in)
    if launched and LEDGER.captured is not None:
        LEDGER.captured.append((computes, args_in, kwargs_in, out))
    if not on_gpu or name in TO_HOST:
        return out
    out = tree_map(lambda x: inner.get(id(x), PretendTensor(x)) if type(x) is Tensor else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def _count(func: Any, args: Any, kwargs: dict[str, Any], ours: list[Any], on_gpu: bool) -> bool:
    """Count an operator that uses or fills the pretended device, and return whether it launches a kernel."""
    if not ours and not on_gpu:
        return False
    name, schema = func.overloadpacket.__name__, func._schema
    if name in TO_HOST | SHAPE_OF_VALUES:
        LEDGER.sync(name)
    if name in ("copy_", "_to_copy"):
        to_gpu = on_gpu if name == "_to_copy" else isinstance(args[0], PretendTensor)
        from_gpu = isinstance(args[0 if name == "_to_copy" else 1], PretendTensor)
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if to_gpu != from_gpu and waits:
            LEDGER.sync("copy to the GPU" if to_gpu else "copy to the host")
    view = any(argument.alias_info is not None for argument in schema.arguments) and not schema.is_mutable
    if view or name in ALLOCATIONS | TO_HOST:
        return False
    LEDGER.launches[name] += 1
    return True


def _unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, PretendTensor) else x


class OnDispatch(TorchDispatchMode):
    """Mode that intercepts factories with a CUDA device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(func, args, kwargs or {})


class OnCall(TorchFunctionMode):
    """Mode for ``torch.tensor`` and lists as indices, which copy from the host and wait, undispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], PretendTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to("cuda")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(args[0].device), *args[2:])
        return func(*args, **kwargs)
