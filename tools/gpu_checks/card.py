"""Rates of the card itself, which the rates of models are compared with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.timing import clock
from gpu_checks.rows import Emit
from gpu_checks.shapes import Setting

_MATRIX, _COPY = 8192, 1 << 30
"""Rows of a square matrix, and bytes of a copied tensor, on a GPU."""
_TINY_MATRIX, _TINY_COPY = 128, 1 << 20
_REPEATS = 20


def measure(setting: Setting, emit: Emit) -> None:
    """Measure matrix products in bfloat16 and float32, and copies from and to the memory of the device."""
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    level, version = torch.backends.cpu.get_cpu_capability(), torch.__version__.partition("+")[0]
    emit({"kind": "machine", "name": name, "cpu_level": level, "torch": version})
    size, width = (_TINY_MATRIX, _TINY_COPY) if setting.tiny else (_MATRIX, _COPY)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        rate = 2.0 * size**3 / _best(partial(_product, *_squares(size, dtype, setting.device)))
        emit({"kind": "card", "name": f"matrix product, {name}", "flops": rate})
    source = torch.zeros(width, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    # A copy reads every byte once and writes it once.
    emit(
        {"kind": "card", "name": "copy", "bytes_per_second": 2 * width / _best(partial(target.copy_, source))}
    )


def _best(run: Any) -> float:
    """Return the seconds of the fastest of some calls; no call is faster than the hardware allows."""
    for _ in range(3):
        run()
    return min(clock(run) for _ in range(_REPEATS))


def _squares(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return left, right, torch.empty_like(left)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out=out)
