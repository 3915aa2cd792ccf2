"""Check whether operators run on a device: as Triton kernels, or by another library."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

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
    return why_it_fails("Triton", device, run)


def why_it_fails(library: str, device: torch.device, run: Callable[[torch.device], object]) -> str:
    """Return why a function that uses a library fails on a device; empty if it runs.

    The answer is usually needed in the middle of a forward pass. What the function saves for its gradients is
    kept from the hooks of that pass: ``torch.utils.checkpoint`` would count it, and miss it when it computes
    the block again.
    """
    try:
        with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            run(device)
    except Exception as error:  # Its errors, and those of compilers, drivers and the system
        return f"{library}: {(str(error).strip() or type(error).__name__).splitlines()[0][:80]}"
    return ""


def check_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check a result against the expected one, within a tolerance relative to its largest element.

    Raises:
        ArithmeticError: If they differ.
    """
    # Also if an element is not a number
    if not bool(((got - expected).abs() <= tolerance * expected.abs().max()).all()):
        raise ArithmeticError("the results are wrong")


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
