"""Machines that lack instructions, operators or tools, simulated in this process or in one of their own."""

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
"""what PyTorch says on a CPU with AVX2 alone"""


def no_avx512(patch: pytest.MonkeyPatch) -> None:
    """AVX2 at the most: no operator for bfloat16 weights, no fast bfloat16 arithmetic."""
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def refuse_bfloat16(weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if weight.dtype == torch.bfloat16:
            raise RuntimeError(NO_BFLOAT16)
        packed: torch.Tensor = reorder(weight, *rest)
        return packed

    patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse_bfloat16)
    no_avx512_flags(patch)


def no_onednn(patch: pytest.MonkeyPatch) -> None:
    """A build of PyTorch without oneDNN, as that for macOS."""
    patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing("mkldnn::_reorder_linear_weight"))
    patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch._C._set_mkldnn_enabled(False)


def onednn_switched_off(patch: pytest.MonkeyPatch) -> None:
    """oneDNN is there, and the user wants none of it."""
    patch.setenv(capabilities.WITHOUT, "onednn_float32 onednn_bfloat16")


def no_fbgemm(patch: pytest.MonkeyPatch) -> None:
    """Any CPU but x86."""
    patch.setattr(torch.ops.quantized, "linear_prepack_fp16", missing("quantized::linear_prepack_fp16"))


def no_int8(patch: pytest.MonkeyPatch) -> None:
    """A build without the weight-only int8 operator."""
    patch.setattr(torch, "_weight_int8pack_mm", missing("aten::_weight_int8pack_mm"))


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    """No C++ compiler, as in most container images."""
    name_compiler(patch, "no-such-compiler")


def name_compiler(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let CXX name this C++ compiler, as if PyTorch had not read it before."""
    patch.setenv("CXX", name)
    patch.setattr(cpp_compiler, "compiler_names", lambda: [name])


def one_thread(patch: pytest.MonkeyPatch) -> None:
    """A single core."""
    torch.set_num_threads(1)


def macos(patch: pytest.MonkeyPatch) -> None:
    """An ARM Mac as far as operators go: neither oneDNN nor FBGEMM, no bfloat16 arithmetic."""
    no_onednn(patch)
    no_fbgemm(patch)
    no_avx512_flags(patch)


def no_avx512_flags(patch: pytest.MonkeyPatch) -> None:
    """What PyTorch says of a CPU without AVX-512."""
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        patch.setattr(torch.cpu, name, lambda: False)


def missing(name: str) -> Callable[..., NoReturn]:
    """An operator that this build doesn't have."""

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
"""by name: simulated in this process, by operators that raise as they do where they are missing"""

LEVELS: dict[str, dict[str, str]] = {
    "avx2": levels.LEVELS["AVX2"],
    "no-avx": levels.LEVELS["no AVX"],
    "onednn-switched-off": {capabilities.WITHOUT: "onednn_float32 onednn_bfloat16"},
    "two-threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
"""by name: simulated in a process of its own, by the instructions that the libraries may use, a library that
isn't used, or more threads than the tests themselves run on"""


def level_environment(level: str) -> dict[str, str]:
    """The environment of a process on a simulated CPU."""
    ours = ("PYTEST_", "TNNLM_CACHE", "COV_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | LEVELS[level]


def forget_probes() -> None:
    """Let every capability be probed anew."""
    capabilities._probed.cache_clear()
