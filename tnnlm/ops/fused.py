"""Fused operators of a decoding step, each a single kernel launch on a GPU.

They are registered with PyTorch as ``tnnlm::gated_step``, ``tnnlm::rms_norm`` and ``tnnlm::silu_gate``. On a
GPU they run the kernels of :mod:`tnnlm.ops.triton_step`, elsewhere the functions of this module, which are
the reference of the kernels.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import silu

from tnnlm.ops.norm import simple_rms_norm
from tnnlm.ops.ssm import SSMParams, SSMState
from tnnlm.ops.triton_probe import why_no_triton
from tnnlm.precision import working_dtype


@torch.library.custom_op("tnnlm::gated_step", mutates_args=("real", "imag"))
def gated_step(
    projected: Tensor,
    taps: Tensor,
    poles: Tensor,
    residues: Tensor,
    window: Tensor,
    real: Tensor,
    imag: Tensor,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Process one token by a gated recurrence, SiLU(a) * conv(SiLU(b)), and update the modes in place.

    Intermediate results have the dtype of the state, so that bfloat16 is rounded once, at the end.

    Args:
        projected: The concatenated a and b, (B, 2 E).
        taps: ``window`` of :class:`~tnnlm.ops.ssm.SSMParams`, (E, P).
        poles: Poles of the recurrence.
        residues: Residues of the recurrence.
        window: Last inputs before the token, as in :class:`~tnnlm.ops.ssm.SSMState`.
        real: Real part of the modes before the token; afterwards, that after the token.
        imag: Imaginary part, likewise.
        active: Mask of rows (B,), or None; the other rows keep their state.

    Returns:
        Outputs (B, E) in the dtype of ``projected``, and the window after the token. The window is a new
        tensor, because each of its elements moves to the place of the next.
    """
    gate, value = silu(projected.to(real.dtype)).chunk(2, dim=-1)
    params, state = SSMParams(taps, poles, residues), SSMState(window, real, imag)
    y, after = params.step(value, state, active)
    real.copy_(after.real)
    imag.copy_(after.imag)
    return (gate * y).to(projected.dtype), after.window.clone()


@torch.library.custom_op("tnnlm::rms_norm", mutates_args=())
def rms_norm(x: Tensor) -> Tensor:
    """Return :func:`~tnnlm.ops.norm.simple_rms_norm` of x (..., D), computed in float32 or wider."""
    return simple_rms_norm(x.to(working_dtype(x.dtype))).to(x.dtype, copy=True)


@torch.library.custom_op("tnnlm::silu_gate", mutates_args=())
def silu_gate(projected: Tensor) -> Tensor:
    """Return SiLU(a) * b (..., H) for the concatenated a and b, (..., 2 H)."""
    gate, value = projected.to(working_dtype(projected.dtype)).chunk(2, dim=-1)
    return (silu(gate) * value).to(projected.dtype)


@gated_step.register_kernel("cuda")
def _gated_step_on_gpu(
    projected: Tensor,
    taps: Tensor,
    poles: Tensor,
    residues: Tensor,
    window: Tensor,
    real: Tensor,
    imag: Tensor,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from tnnlm.ops import triton_step

    return triton_step.gated_step(projected, taps, poles, residues, window, real, imag, active)


@rms_norm.register_kernel("cuda")
def _rms_norm_on_gpu(x: Tensor) -> Tensor:
    from tnnlm.ops import triton_step

    return triton_step.rms_norm(x)


@silu_gate.register_kernel("cuda")
def _silu_gate_on_gpu(projected: Tensor) -> Tensor:
    from tnnlm.ops import triton_step

    return triton_step.silu_gate(projected)


@cache
def why_not_fused(device: torch.device) -> str:
    """Return why the kernels don't run on a GPU; empty if they do, and on other devices."""
    return why_no_triton(device, _run_all) if device.type == "cuda" else ""


def _run_all(device: torch.device) -> None:
    """Run every operator once, with one channel, mode and tap."""
    x = torch.zeros(1, 2, device=device)
    modes = torch.zeros(1, 2, 1, device=device)
    params = SSMParams(x[:, :1], modes[0].double(), modes)
    gated_step(rms_norm(x), *params, *params.init_state(1), None)
    silu_gate(x)
