"""Kernels in Triton: equal to PyTorch in Triton's interpreter, and compiled for GPUs without one."""

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
from tnnlm.ops import fused
from tnnlm.ops.ssm import SSMParams, SSMState

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
TOLERANCE = 1e-5
OPTIONS = {"enable_fp_fusion": True}
CASES = {
    # name: rows, channels, taps, modes, shared poles, bfloat16, masked
    "shared poles": (3, 37, 0, 5, True, False, False),
    "poles per channel": (3, 37, 0, 4, False, False, False),
    "window": (1, 5, 6, 0, True, False, False),
    "window and shared poles": (1, 37, 1, 16, True, False, False),
    "window and poles per channel": (3, 19, 3, 7, False, False, True),
    "inactive rows": (3, 37, 5, 3, True, False, True),
    "many rows": (64, 5, 2, 3, True, False, True),
    "several blocks": (1, 33, 131, 70, False, False, False),
    "bfloat16": (3, 37, 4, 8, True, True, True),
}


def random_step(
    rows: int, channels: int, taps: int, modes: int, shared: bool, narrow: bool, masked: bool
) -> tuple[torch.Tensor, SSMParams, SSMState, torch.Tensor | None]:
    torch.manual_seed(0)
    lead = () if shared else (channels,)
    radius = 0.9 + 0.0999 * torch.rand(*lead, modes, dtype=torch.float64)
    angle = 3 * torch.rand(*lead, modes, dtype=torch.float64)
    poles = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-2)
    params = SSMParams(
        torch.randn(channels, taps) / (taps + 1), poles, torch.randn(channels, 2, modes) / (modes + 1)
    )
    state = SSMState(*(torch.randn_like(part) for part in params.init_state(rows)))
    projected = torch.randn(rows, 2 * channels)
    active = torch.arange(rows) % 3 != 1 if masked else None
    return projected.bfloat16() if narrow else projected, params, state, active


@pytest.mark.parametrize("case", CASES)
def test_gated_step_is_the_step_of_the_recurrence(case: str) -> None:
    projected, params, state, active = random_step(*CASES[case])
    gate, value = torch.nn.functional.silu(projected.float()).chunk(2, dim=-1)
    y, expected = params.step(value, state, active)
    updated = SSMState(*(part.clone() for part in state))
    out, window = fused.gated_step(projected, *params, *updated, active)
    assert torch.equal(out, (gate * y).to(projected.dtype))
    for got, after in zip((window, updated.real, updated.imag), expected, strict=True):
        assert torch.equal(got, after)
    assert torch.equal(updated.window, state.window)


def check_interpreter() -> None:
    """Compare the kernels with the functions in PyTorch; run with TRITON_INTERPRET=1."""
    from tnnlm.ops import triton_step

    for case, settings in CASES.items():
        projected, params, state, active = random_step(*settings)
        states = [SSMState(*(part.clone() for part in state)) for _ in range(2)]
        expected, got = (
            (*step(projected, *params, *own, active), own.real, own.imag)
            for step, own in zip((fused.gated_step, triton_step.gated_step), states, strict=True)
        )
        # Sums in another order may round to the neighbouring bfloat16 number.
        rounding = 0.0 if projected.dtype == torch.float32 else 2**-7
        largest = 0.0
        for left, right, rtol in zip(got, expected, (rounding, 0, 0, 0), strict=True):
            assert left.dtype == right.dtype
            torch.testing.assert_close(left, right, rtol=rtol, atol=TOLERANCE)
            if not rtol and left.numel():
                largest = max(largest, float((left - right).abs().max()))
        assert torch.equal(states[1].window, state.window)
        print(f"{case:30} {largest:.1e}")
    for x in (torch.randn(3, 37), torch.randn(2, 5, 6), torch.zeros(1, 8), torch.randn(7, 2000)[:, ::2]):
        torch.testing.assert_close(triton_step.rms_norm(x), fused.rms_norm(x), rtol=0, atol=TOLERANCE)
        if x.shape[-1] % 2 == 0:
            left, right = triton_step.silu_gate(x), fused.silu_gate(x)
            torch.testing.assert_close(left, right, rtol=0, atol=TOLERANCE)


def check_compiler() -> None:
    """Compile every kernel for compute capabilities 8.0 and 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tnnlm.ops import triton_step

    steps = ["projected", "taps", "poles", "residues", "window", "real", "imag", "active", "out", "after"]
    fixed = {"MASKED": True, "BLOCK_E": 32, "BLOCK_N": 16, "BLOCK_P": 2}
    gated = dict.fromkeys(steps, "*fp32") | {"poles": "*fp64", "active": "*u8"}
    gated |= dict.fromkeys("ENP", "i32")
    narrow = gated | {"projected": "*bf16", "out": "*bf16"}
    norm = {"x": "*fp32", "out": "*fp32", "D": "i32", "scale": "fp32"}
    gate = {"projected": "*fp32", "out": "*fp32", "size": "i32", "H": "i32"}
    sources = [
        (triton_step.gated_step_kernel, gated, {"SHARED": True, **fixed}),
        (triton_step.gated_step_kernel, narrow, {"SHARED": False, **fixed}),
        (triton_step.gated_step_kernel, gated, {"SHARED": True, **fixed, "MASKED": False}),
        (triton_step.rms_norm_kernel, norm, {"BLOCK": 512}),
        (triton_step.silu_gate_kernel, gate, {"BLOCK": 1024}),
    ]
    for capability in (80, 90):
        for kernel, signature, constants in sources:
            signature = signature | dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
            assert f".target sm_{capability}" in built.asm["ptx"]
            assert built.asm["cubin"][:4] == b"\x7fELF"
            print(capability, kernel.__name__, len(built.asm["cubin"]), "bytes")


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
    code = f"from tests.ops.test_triton_step import {name}; {name}()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
