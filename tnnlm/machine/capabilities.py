"""What this CPU and this build of PyTorch can do: found by running each operator once on a tiny tensor.

Names of processors say little: an operator can be missing from a build (oneDNN on macOS), need an instruction
that the CPU lacks (bfloat16 weights without AVX-512), or give wrong results. Each is called and compared with
the plain product; what raises or differs is unavailable, with the reason. The command
``python -m tnnlm.machine.capabilities`` prints the table.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnnlm.errors import UserError, run_script
from tnnlm.machine.cpp_compiler import check_cpp_compiler
from tnnlm.machine.threads import limit_threads

WITHOUT = "TNNLM_WITHOUT"
"""environment variable: capabilities that are not to be used, by name, separated by blanks. A compiled step
uses none of them; what PyTorch's own bfloat16 arithmetic calls goes by ``bfloat16_arithmetic``."""
_TOLERANCE = 0.02
"""largest relative error of a probe, the rounding of its weights included"""


class Capability(NamedTuple):
    """Whether something works here; if not, why, in one line."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def capability(name: str) -> Capability:
    """Whether ``name``, one of ``PROBES``, works on this machine's CPU.

    Probed once per process. The environment variable TNNLM_WITHOUT switches capabilities off.

    Raises:
        KeyError: for another name.
        UserError: if that variable names none of ``PROBES``.
    """
    probe = PROBES[name].run
    if name in switched_off():
        return Capability(False, f"switched off by {WITHOUT}")
    return _probed(probe)


def switched_off() -> set[str]:
    """Names that TNNLM_WITHOUT lists.

    Raises:
        UserError: if one is none of ``PROBES``.
    """
    names = set(os.environ.get(WITHOUT, "").replace(",", " ").split())
    unknown = sorted(names - PROBES.keys())
    if unknown:
        raise UserError(f"{WITHOUT}: no capability {unknown[0]}; expected some of {', '.join(PROBES)}")
    return names


@functools.cache
def _probed(probe: Callable[[], None]) -> Capability:
    try:
        with torch.inference_mode():
            probe()
    except Exception as error:  # whatever an operator raises, it can't be used
        lines = str(error).splitlines()
        return Capability(False, lines[0][:160] if lines else type(error).__name__)
    return Capability(True, "")


def cpu_level() -> str:
    """The widest vector instructions that PyTorch uses here, in its own words: AVX2, AVX512, DEFAULT ..."""
    return torch.backends.cpu.get_cpu_capability()


def processor() -> str:
    """The CPU's name as its maker gives it, where the system tells."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def describe_cpu() -> str:
    """Processor, vector level and threads in one line, for the head of a benchmark."""
    return f"{processor()} ({cpu_level()}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def capability_table() -> dict[str, Any]:
    """Everything that is known of this machine, as plain data: processor, threads, and every probe."""
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
    """Hash of the processor's instructions: native code made for one must not run on another."""
    said = (platform.machine(), cpu_level(), _cpuinfo("flags", "Features") or platform.processor())
    return hashlib.sha256(" ".join(said).encode()).hexdigest()[:16]


def _cpuinfo(*names: str) -> str:
    """The first line of Linux's list that has one of these names; empty where there is none."""
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


def _fbgemm_float16(x: Tensor, weight: Tensor) -> Tensor:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1) / 127
    integers = (weight / scale[:, None]).round().to(torch.int8)
    return torch._weight_int8pack_mm(x.bfloat16(), integers, scale.bfloat16())


def _compare(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Run ``multiply(x, weight)`` on one row and on three, against float64.

    Raises:
        RuntimeError: if a result is off.
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
    # An operator that emulates bfloat16 works too, many times slower than float32, and times on a busy
    # machine would choose otherwise every other day: what the CPU has decides, as far as PyTorch may use it.
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not has:
        raise RuntimeError("this CPU has neither AVX512-BF16 nor AMX")
    if not cpu_level().startswith("AVX512"):
        raise RuntimeError(f"PyTorch is limited to {cpu_level()} instructions")


class Probe(NamedTuple):
    """What is tried, in words, and how: ``run`` raises where it doesn't work."""

    title: str
    run: Callable[[], None]


PROBES = {
    "onednn_float32": Probe(
        "oneDNN linear layers, float32 weights, and convolutions of prefill",
        partial(_compare, partial(_onednn_linear, dtype=torch.float32)),
    ),
    "onednn_bfloat16": Probe(
        "oneDNN linear layers, bfloat16 weights",
        partial(_compare, partial(_onednn_linear, dtype=torch.bfloat16)),
    ),
    "fbgemm_float16": Probe(
        "FBGEMM linear layers, float16 weights, float32 arithmetic", partial(_compare, _fbgemm_float16)
    ),
    "int8": Probe("weight-only int8 linear layers", partial(_compare, _int8_linear)),
    "bfloat16_arithmetic": Probe("training in bfloat16 faster than in float32", _bfloat16_arithmetic),
    "cpp_compiler": Probe("C++ compiler, for compiled decoding steps", check_cpp_compiler),
}
"""by the name that TNNLM_WITHOUT takes"""


def main() -> int:
    """Print the table, with ``--json`` as data."""
    parser = argparse.ArgumentParser(
        prog="python -m tnnlm.machine.capabilities",
        description="What this CPU and this build of PyTorch can do, found by running each operator once. "
        f"{WITHOUT}='NAME ...' switches capabilities off, here and in every script.",
    )
    parser.add_argument("--json", action="store_true", help="the table as JSON")
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
