"""Check whether operators can run as Triton kernels on a device."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

_OLDEST = (8, 0)
"""Lowest compute capability that the kernels are compiled and tested for: A100."""


def why_no_triton(device: torch.device, run: Callable[[torch.device], object]) -> str:
    """Return why kernels don't run on a GPU; empty if they do.

    Triton compiles a kernel at its first launch, for which it needs a C compiler.

    Args:
        device: A CUDA device.
        run: Function that runs every operator once on the device.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return "compute capability below 8.0"
    try:
        run(device)
    except Exception as error:  # Triton raises errors of the compiler, the driver and the operating system
        return f"Triton: {(str(error).strip() or type(error).__name__).splitlines()[0][:80]}"
    return ""
