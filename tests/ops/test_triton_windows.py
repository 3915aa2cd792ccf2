"""Products of spectra in Triton: equal to PyTorch in the interpreter, and compiled for GPUs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.scripts import ROOT
from tnnlm.ops import row_windows

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def check_interpreter() -> None:
    """Compare the kernels with the functions in PyTorch; run with TRITON_INTERPRET=1."""
    from tnnlm.ops import triton_windows

    rows = row_windows.ROWS
    for channels, batch, size, dtype in (
        (2, 1, 3, torch.cfloat),
        (2, 3, 129, torch.cdouble),
        (1, rows + 3, 5, torch.cfloat),
    ):
        torch.manual_seed(0)
        groups = -(-batch // rows)
        windows = torch.randn(2, channels * batch - 1 if batch > 1 else 0, size, dtype=dtype)
        first = torch.randn(2, channels, groups, size, dtype=dtype)
        taps = torch.randn(channels, size, dtype=dtype)
        inputs = (windows[0], first[0], windows[1], first[1], taps, batch)
        got = (
            triton_windows.row_product(*inputs[2:], rows),
            *triton_windows.row_product_backward(*inputs, rows),
        )
        expected = row_windows.row_product(*inputs[2:]), *row_windows.row_product_backward(*inputs)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4 if dtype == torch.cfloat else 1e-12)
        print(channels, batch, size, dtype)


def check_compiler() -> None:
    """Compile both kernels for compute capabilities 8.0 and 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tnnlm.ops import triton_windows

    forward = ["windows", "first", "taps", "out"]
    backward = ["grad_windows", "grad_first", "windows", "first", "taps", "grad_out", "taps_out"]
    constants = {"ROWS": row_windows.ROWS, "BLOCK": 128}
    kernels = {
        triton_windows.row_product_kernel: forward,
        triton_windows.row_product_backward_kernel: backward,
    }
    for capability in (80, 90):
        for kernel, tensors in kernels.items():
            for dtype in ("fp32", "fp64"):
                signature = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("B", "F", "GROUPS"), "i32")
                signature |= dict.fromkeys(constants, "constexpr")
                source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                assert f".target sm_{capability}" in built.asm["ptx"]
                assert built.asm["cubin"][:4] == b"\x7fELF"
                print(capability, kernel.__name__, dtype, len(built.asm["cubin"]), "bytes")


@needs_triton
@pytest.mark.parametrize(
    ("check", "variables"),
    [(check_interpreter, {"TRITON_INTERPRET": "1"}), (check_compiler, {})],
    ids=["interpreter", "compiler"],
)
def test_kernels(check: Callable[[], None], variables: dict[str, str], tmp_path: Path) -> None:
    # In a separate process, because Triton reads the variable when it is imported.
    name = check.__name__
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "TRITON_CACHE_DIR": f"{tmp_path}", **variables}
    code = f"from tests.ops.test_triton_windows import {name}; {name}()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
