"""Simulated machines that lack instructions, operators or tools, in this process or in a separate one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from benchmarks import levels
from tnnlm.machine import capabilities, cpp_compiler

NO_BFLOAT16 = (
    "mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and "
    "avx512dq"
)
"""Error message of PyTorch on a CPU that has AVX2 but not AVX-512."""


def no_avx512(patch: pytest.MonkeyPatch) -> None:
    """Simulate a CPU with AVX2 only: no operator for bfloat16 weights, and slow bfloat16 arithmetic."""
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def refuse_bfloat16(weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if weight.dtype == torch.bfloat16:
            raise RuntimeError(NO_BFLOAT16)
        packed: torch.Tensor = reorder(weight, *rest)
        return packed

    patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse_bfloat16)
    no_avx512_flags(patch)


def no_onednn(patch: pytest.MonkeyPatch) -> None:
    """Simulate a build of PyTorch without oneDNN, such as that for macOS."""
    patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing("mkldnn::_reorder_linear_weight"))
    patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch._C._set_mkldnn_enabled(False)


def onednn_switched_off(patch: pytest.MonkeyPatch) -> None:
    """Disable oneDNN by the environment variable, although it is available."""
    patch.setenv(capabilities.WITHOUT, "onednn_float32 onednn_bfloat16")


def no_fbgemm(patch: pytest.MonkeyPatch) -> None:
    """Simulate a CPU other than x86."""
    for name in ("linear_prepack_fp16", "linear_prepack"):
        patch.setattr(torch.ops.quantized, name, missing(f"quantized::{name}"))


def no_int8(patch: pytest.MonkeyPatch) -> None:
    """Simulate a build of PyTorch without operators for int8 weights."""
    patch.setattr(torch.ops.quantized, "linear_prepack", missing("quantized::linear_prepack"))
    patch.setattr(torch, "_weight_int8pack_mm", missing("aten::_weight_int8pack_mm"))


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without a C++ compiler, such as most container images."""
    name_compiler(patch, "no-such-compiler")


def name_compiler(patch: pytest.MonkeyPatch, name: str) -> None:
    """Set CXX to this C++ compiler, as if PyTorch had not read it before."""
    patch.setenv("CXX", name)
    patch.setattr(cpp_compiler, "compiler_names", lambda: [name])


def one_thread(patch: pytest.MonkeyPatch) -> None:
    """Simulate a single core."""
    torch.set_num_threads(1)


def macos(patch: pytest.MonkeyPatch) -> None:
    """Simulate the operators of an ARM Mac: neither oneDNN nor FBGEMM, and slow bfloat16 arithmetic."""
    no_onednn(patch)
    no_fbgemm(patch)
    no_avx512_flags(patch)


def no_avx512_flags(patch: pytest.MonkeyPatch) -> None:
    """Make PyTorch report a CPU without AVX-512."""
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        patch.setattr(torch.cpu, name, lambda: False)


def missing(name: str) -> Callable[..., NoReturn]:
    """Return an operator that raises the error of PyTorch for one that the build lacks."""

    def call(*_: Any) -> NoReturn:
        raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CPU' backend")

    return call


MACHINES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "this-machine": lambda patch: None,
    "no-avx512": no_avx512,
    "no-onednn": no_onednn,
    "onednn-switched-off": onednn_switched_off,
    "no-fbgemm": no_fbgemm,
    "no-int8": no_int8,
    "no-compiler": no_compiler,
    "one-thread": one_thread,
    "macos": macos,
}
"""Machines by name, simulated in this process by operators that raise the error of a machine without them."""

LEVELS: dict[str, dict[str, str]] = {
    "avx2": levels.LEVELS["AVX2"],
    "no-avx": levels.LEVELS["no AVX"],
    "onednn-switched-off": {capabilities.WITHOUT: "onednn_float32 onednn_bfloat16"},
    "two-threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
"""Machines by name, simulated in a separate process: limited instructions, a disabled library, or more
threads than the tests use."""


def level_environment(level: str) -> dict[str, str]:
    """Return the environment of a process on a simulated CPU."""
    ours = ("PYTEST_", "TNNLM_CACHE", "COV_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | LEVELS[level]


def forget_probes() -> None:
    """Clear the cached capabilities, so that they are probed again."""
    capabilities._probed.cache_clear()
