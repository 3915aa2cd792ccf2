"""What the RTF kernel's parallel form costs as its state grows: seconds and memory of a training step.

Measured of a layer alone (taps, convolution and their gradients), where a model would hide it.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from experiments.experiment import Row
from tnnlm.kernels import RTFConfig, build_kernel
from tnnlm.modules import LongConv

_WARM_UP = 2


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations within it made and that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, int] = {}
        """bytes of a storage, by its address among storages"""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count the tensors that it returns."""
        out = func(*args, **(kwargs or {}))
        for part in tree_iter(out):
            if isinstance(part, Tensor):
                self._count(part.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._held:
            self._held[key] = storage.nbytes()
            self.peak = max(self.peak, sum(self._held.values()))
            weakref.finalize(storage, self._held.pop, key, None)


def measure_cost(cell: Row) -> Row:
    """Training steps of one RTF layer at several state sizes, in turns.

    Args:
        cell: ``state_sizes``, ``d_model`` (channels), ``length``, ``batch`` (rows), ``rounds``.

    Returns:
        by state size, as strings: ``seconds`` (medians) and ``peak_bytes`` (of tensors that a step
        makes; parameters, which do grow with the state, are not among them).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cell["seed"])
    x = torch.randn(cell["batch"], cell["length"], cell["d_model"], device=device)
    steps = {n: _stepper(n, x) for n in cell["state_sizes"]}
    times: dict[int, list[float]] = {n: [] for n in steps}
    for turn in range(_WARM_UP + cell["rounds"]):
        for n, step in steps.items():
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            if turn >= _WARM_UP:
                times[n].append(time.perf_counter() - started)
    peaks = {}
    for n, step in steps.items():
        with PeakBytes() as counted:
            step()
        peaks[str(n)] = counted.peak
    return {"seconds": {str(n): statistics.median(t) for n, t in times.items()}, "peak_bytes": peaks}


def _stepper(state_size: int, x: Tensor) -> Callable[[], None]:
    config = RTFConfig(name="rtf", state_size=state_size, denominators=1, init="xavier", constraint="montel")
    conv = LongConv(build_kernel(config, x.shape[2], x.shape[1])).to(x.device)

    def step() -> None:
        conv.zero_grad()
        loss: Tensor = conv(x).square().mean()
        loss.backward()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
