"""Operators available on this CPU and build of PyTorch, detected by running each one on a small tensor.

The processor's name is not enough: an operator can be missing from a build (oneDNN on macOS), need an
instruction set that the CPU lacks (bfloat16 weights without AVX-512), or return wrong results. Each operator
is compared with a plain matrix product; it is unavailable if it raises or differs. ``python -m
tnnlm.machine.capabilities`` prints the results.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.machine.cpp_compiler import check_cpp_compiler
from tnnlm.machine.threads import limit_threads

WITHOUT = "TNNLM_WITHOUT"
"""Environment variable with the names of capabilities to disable, separated by spaces or commas.

A compiled step of a single row uses none of these capabilities, and one of batches uses oneDNN. Operators
that PyTorch calls for bfloat16 arithmetic are covered by ``bfloat16_arithmetic``.
"""
_X86 = ("x86_64", "AMD64")
"""Names of the architecture on Linux and Windows."""
_TOLERANCE = 0.02
"""Maximum relative error of a probe, which includes the rounding of its weights."""


class Capability(NamedTuple):
    """Availability of an operator or tool on this machine, with the reason if it is unavailable."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def capability(name: str) -> Capability:
    """Return whether a capability is available on this machine.

    Each capability is probed once per process. The environment variable TNNLM_WITHOUT disables capabilities.

    Args:
        name: Name of a capability in ``PROBES``.

    Raises:
        KeyError: If ``name`` isn't in ``PROBES``.
        UserError: If TNNLM_WITHOUT contains an unknown name.
    """
    probe = PROBES[name].run
    if name in switched_off():
        return Capability(False, f"disabled by {WITHOUT}")
    return _probed(probe)


def switched_off() -> set[str]:
    """Return the capabilities that TNNLM_WITHOUT disables.

    Raises:
        UserError: If the variable contains a name that isn't in ``PROBES``.
    """
    names = set(os.environ.get(WITHOUT, "").replace(",", " ").split())
    unknown = sorted(names - PROBES.keys())
    if unknown:
        raise UserError(f"{WITHOUT}: unknown capability {unknown[0]}; choose from {', '.join(PROBES)}")
    return names


@functools.cache
def _probed(probe: Callable[[], None]) -> Capability:
    try:
        with torch.inference_mode():
            probe()
    except Exception as error:  # an operator that raises anything can't be used
        lines = str(error).splitlines()
        return Capability(False, lines[0][:160] if lines else type(error).__name__)
    return Capability(True, "")


def cpu_level() -> str:
    """Return the widest vector instruction set that PyTorch uses on this CPU: AVX2, AVX512, DEFAULT ..."""
    return torch.backends.cpu.get_cpu_capability()


def processor() -> str:
    """Return the model name of the CPU, or its architecture if the system doesn't report a name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def describe_cpu() -> str:
    """Return CPU, vector instruction set, threads and PyTorch version in one line, for benchmark headers."""
    return f"{processor()} ({cpu_level()}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def capability_table() -> dict[str, Any]:
    """Return CPU, number of threads and the result of every probe as plain data."""
    limit = limit_threads()
    return {
        "processor": processor(),
        "cpu_level": cpu_level(),
        "threads": limit.threads,
        "threads_reason": limit.reason,
        "torch": torch.__version__,
        **{name: capability(name)._asdict() for name in PROBES},
    }


def cpu_fingerprint() -> str:
    """Return a hash of the CPU's instruction sets; native code compiled for one must not run on another."""
    said = (platform.machine(), cpu_level(), _cpuinfo("flags", "Features") or platform.processor())
    return hashlib.sha256(" ".join(said).encode()).hexdigest()[:16]


def _cpuinfo(*names: str) -> str:
    """Return the first field of /proc/cpuinfo with one of these names, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _onednn_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 1)
    return torch.ops.mkldnn._linear_pointwise.default(x.to(dtype), packed, None, "none", [], "")


def _mkl_product(x: Tensor, weight: Tensor) -> Tensor:
    if not torch.backends.mkl.is_available():
        raise RuntimeError("PyTorch was built without MKL")
    parts = weight.unflatten(0, (2, -1))
    return torch.bmm(parts, x.unsqueeze(0).mT.expand(2, -1, -1)).flatten(0, 1).T


def _fbgemm_float16(x: Tensor, weight: Tensor) -> Tensor:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _fbgemm_int8(x: Tensor, weight: Tensor, levels: int = 63) -> Tensor:
    scale = weight.abs().amax(1).double() / 127
    integers = (weight / scale[:, None]).round().to(torch.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates quantised tensors
        zeros = torch.zeros(len(scale), dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(integers, scale, zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
    step = float(x.abs().max()) / levels
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, step, levels + 1, packed)


def _onednn_int8(x: Tensor, weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1) / 127
    packed = torch.ops.onednn.qlinear_prepack((weight / scale[:, None]).round().to(torch.int8), None)
    step = float(x.abs().max()) / 127
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise.default(
        (x / step).round().add(128).to(torch.uint8), step, 128, packed, scale, zeros,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def _onednn_8bit_inputs() -> None:
    # Without VNNI instructions oneDNN has another operator, which is many times slower.
    if not torch.cpu._is_vnni_supported() or not cpu_level().startswith("AVX512"):
        raise RuntimeError("this CPU has no AVX512-VNNI, or PyTorch is limited to other instructions")
    _compare(_onednn_int8)
    _check_largest_sums(_onednn_int8)


def _fbgemm_8bit_inputs() -> None:
    _check_largest_sums(partial(_fbgemm_int8, levels=127))


def _check_largest_sums(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    # Pairs of the largest products exceed 16 bits, which saturate in operators without VNNI instructions.
    largest = torch.ones(3, 64)
    error = float((multiply(largest, largest) / 64 - 1).abs().max())
    if not error <= 1e-3:
        raise RuntimeError(f"16-bit sums overflow (relative error {error:.1e})")


def _int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    # Without vectors the operator is several times slower than float32. ARM always has vectors.
    if platform.machine() in _X86 and cpu_level() == "DEFAULT":
        raise RuntimeError("PyTorch's int8 operator is slow without AVX2 instructions")
    scale = weight.abs().amax(1) / 127
    integers = (weight / scale[:, None]).round().to(torch.int8)
    return torch._weight_int8pack_mm(x.bfloat16(), integers, scale.bfloat16())


def _compare(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compare ``multiply(x, weight)`` with the float64 product, for one row and for three.

    Raises:
        RuntimeError: If the relative error exceeds the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    for rows in (1, 3):
        x = torch.randn(rows, 64, generator=generator)
        expected = x.double() @ weight.double().T
        error = float((multiply(x, weight).double() - expected).norm() / expected.norm())
        if not error <= _TOLERANCE:
            raise RuntimeError(f"gives wrong results (relative error {error:.1e})")


def _bfloat16_arithmetic() -> None:
    # Emulated bfloat16 works too, but is many times slower than float32, and timing it on a busy machine
    # isn't reproducible. The decision therefore follows the CPU's instructions and PyTorch's limit on them.
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not has:
        raise RuntimeError("this CPU has neither AVX512-BF16 nor AMX")
    if not cpu_level().startswith("AVX512"):
        raise RuntimeError(f"PyTorch is limited to {cpu_level()} instructions")


class Probe(NamedTuple):
    """Test of one capability; ``run`` raises an exception if it is unavailable."""

    title: str
    run: Callable[[], None]


PROBES = {
    "onednn_float32": Probe(
        "oneDNN linear layers with float32 weights, and prefill convolutions",
        partial(_compare, partial(_onednn_linear, dtype=torch.float32)),
    ),
    "mkl_float32": Probe(
        "MKL linear layers with float32 weights, for single rows", partial(_compare, _mkl_product)
    ),
    "onednn_bfloat16": Probe(
        "oneDNN linear layers with bfloat16 weights",
        partial(_compare, partial(_onednn_linear, dtype=torch.bfloat16)),
    ),
    "fbgemm_float16": Probe(
        "FBGEMM linear layers with float16 weights and float32 arithmetic", partial(_compare, _fbgemm_float16)
    ),
    "fbgemm_int8": Probe(
        "FBGEMM linear layers with int8 weights and 7-bit inputs", partial(_compare, _fbgemm_int8)
    ),
    "fbgemm_8bit_inputs": Probe("the same with 8-bit inputs", _fbgemm_8bit_inputs),
    "onednn_int8": Probe(
        "oneDNN linear layers with int8 weights and 8-bit inputs, for compiled batches", _onednn_8bit_inputs
    ),
    "int8": Probe("weight-only int8 linear layers", partial(_compare, _int8_linear)),
    "bfloat16_arithmetic": Probe("training in bfloat16 faster than in float32", _bfloat16_arithmetic),
    "cpp_compiler": Probe("C++ compiler, for compiled decoding steps", check_cpp_compiler),
}
"""Probes of all capabilities, by the names used in TNNLM_WITHOUT."""


def main() -> int:
    """Print the table of capabilities, as JSON with ``--json``."""
    parser = OneLineParser(
        prog="python -m tnnlm.machine.capabilities",
        description="Show which operators work on this CPU and build of PyTorch, by running each one once. "
        f"{WITHOUT}='NAME ...' disables capabilities, in this command and in all scripts.",
    )
    parser.add_argument("--json", action="store_true", help="Print the table as JSON.")
    args = parser.parse_args()
    table = capability_table()
    if args.json:
        print(json.dumps(table, indent=2))
        return 0
    print(f"{table['processor']}, {table['cpu_level']}, PyTorch {table['torch']}")
    print(f"{table['threads']} threads ({table['threads_reason']})")
    for name, probe in PROBES.items():
        found = capability(name)
        print(
            f"{name:20s} {'yes' if found else 'no ':3s}  {probe.title}{'' if found else f': {found.reason}'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
