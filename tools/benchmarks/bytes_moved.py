"""Count of the bytes that the operators of a causal convolution read and write, forward and backward.

The count is that of a GPU with a perfect cache within an operator and none between operators: each operator
that isn't a view reads its arguments and writes its results once. Copies that PyTorch makes within an
operator don't count. Products of spectra are separate operators,
as on a GPU, but no GPU is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import report
from experiments.commits import current_commit
from tnnlm.errors import run_script
from tnnlm.files import write_text
from tnnlm.machine.capabilities import cpu_level
from tnnlm.ops import row_windows, toeplitz
from tnnlm.ops.conv_backends import use_backend

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs/records/bytes_moved.json"
SHAPE = (64, 512, 4)
"""Batch, length and channels; with a large batch, the share of the taps is small."""
UNREAD = {"copy_", "zero_", "fill_", "new_zeros", "zeros_like", "ones_like"}
"""Operators that don't read their first argument."""
INSIDE: dict[Any, Callable[..., Any]] = {
    torch.ops.tnnlm.row_conv.default: row_windows.convolve,
    torch.ops.tnnlm.row_conv_backward.default: row_windows.convolve_backward,
    torch.ops.tnnlm.circular_conv.default: toeplitz.convolve,
    torch.ops.tnnlm.circular_conv_backward.default: toeplitz.convolve_backward,
}
"""Operators of the package that consist of other operators."""
COMPOSITE = {torch.ops.aten.fft_rfft.default, torch.ops.aten.fft_rfft.out, torch.ops.aten.fft_irfft.default}
"""Operators of PyTorch that do, such as padding and a transform."""


class ByteCounter(TorchDispatchMode):
    """Mode that adds up the bytes that operators read and write."""

    def __init__(self, distinct: bool) -> None:
        super().__init__()
        self.distinct = distinct
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it, or count the operators that it consists of."""
        kwargs = kwargs or {}
        inside = INSIDE.get(func, func.decompose if func in COMPOSITE else None)
        if inside:
            with self:
                return inside(*args, **kwargs)
        out = func(*args, **kwargs)
        schema = func._schema
        views = any(
            result.alias_info is not None and not result.alias_info.is_write for result in schema.returns
        )
        name = func.overloadpacket.__name__
        # Fake tensors dispatch the operators in prim, such as a tensor's device, which read no elements.
        if not views and "empty" not in name and func.namespace != "prim":
            read = [value for key, value in kwargs.items() if key != "out"]
            read.extend(args[1:] if name in UNREAD else args)
            self.total += sum(_bytes(tensor, self.distinct) for tensor in tree_leaves((read, out)))
        return out


def bytes_per_element(backend: str, dtype: torch.dtype, channels_first: bool, distinct: bool) -> float:
    """Return the bytes moved per token and channel by a convolution and its gradients.

    Args:
        backend: Name of a backend of :mod:`tnnlm.ops.conv_backends`.
        dtype: Dtype of the inputs; taps are in float32.
        channels_first: Whether the memory layout of the inputs and gradients is (E, B, L), as in the model,
            or (B, L, E).
        distinct: Whether elements that a view repeats count once.
    """
    batch, length, channels = SHAPE
    x = torch.randn(channels, batch, length).permute(1, 2, 0)
    x = (x if channels_first else x.contiguous()).to(dtype).requires_grad_()
    k = torch.randn(channels, length, requires_grad=True)
    grad = torch.ones_like(x)
    with use_backend(backend), ByteCounter(distinct) as counter:
        torch.autograd.grad(toeplitz.toeplitz(x, k), (x, k), grad)
    return counter.total / x.numel()


def _bytes(value: Any, distinct: bool) -> int:
    """Return the bytes of a tensor's elements; those that are expanded from others never count."""
    if not isinstance(value, Tensor):
        return 0
    count, extent = 1, 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        count *= size if stride else 1
        extent += (size - 1) * stride
    return value.element_size() * (min(count, extent) if distinct else count)


def main() -> int:
    """Count every case, write the record and print its table; return the exit code."""
    rows = [
        {"inputs": label, **_counts(dtype, channels_first), "unit": "bytes per token and channel"}
        for label, dtype, channels_first in (
            ("float32, layout of the model", torch.float32, True),
            ("bfloat16, layout of the model", torch.bfloat16, True),
            ("float32, channels last", torch.float32, False),
        )
    ]
    record = {
        "command": "python -m benchmarks.bytes_moved",
        "machine": "any machine: the figures are counted",
        "cpu_level": cpu_level(),
        "torch": torch.__version__.partition("+")[0],
        "date": str(date.today()),
        "commit": current_commit(),
        "tables": {"bytes": rows},
    }
    write_text(OUT, json.dumps(record, indent=1) + "\n")
    print(report.table(rows))
    return 0


def _counts(dtype: torch.dtype, channels_first: bool) -> dict[str, str]:
    cases = {
        "tiles": ("tiles", False),
        "windows": ("windows", False),
        "windows, overlap once": ("windows", True),
    }
    return {
        label: f"{bytes_per_element(name, dtype, channels_first, distinct):.0f}"
        for label, (name, distinct) in cases.items()
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
