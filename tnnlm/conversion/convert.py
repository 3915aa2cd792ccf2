"""Kernels to recurrences, one layer or a whole model, without training and without data."""

from __future__ import annotations

import copy

import torch

from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.conversion.window import window
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.model import CausalLM
from tnnlm.modules import LongConv, RecurrentConv
from tnnlm.ops import ssm
from tnnlm.ops.ssm import SSMParams

METHODS = ("etsc", "window")


def convert_kernel(kernel: Kernel, *, method: str, horizon: int) -> SSMParams:
    """The recurrence that equals ``kernel`` at lags below ``horizon``.

    The taps are those that training used, bit for bit; the algebra on them is in float64; what
    is returned is stored in the taps' dtype (at least float32), poles in float64.

    Raises:
        UserError: for an unknown method or taps that are not finite.
    """
    with torch.no_grad():
        k = kernel(horizon)
        if not bool(torch.isfinite(k).all()):
            raise UserError(
                "the kernel's taps are not finite: the training diverged, take an earlier checkpoint"
            )
        if method == "etsc":
            params = etsc(k.double(), kernel.decay)
        elif method == "window":
            params = window(k.double())
        else:
            raise UserError(f"unknown conversion method {method!r}; there is {', '.join(METHODS)}")
        return ssm.to_dtype(params, k.dtype)


def model_horizon(model: CausalLM, horizon: int | str = "auto") -> int:
    """The horizon in lags: as given, or for ``auto`` the largest that a layer needs.

    A kernel that never dies out (no decay) is converted on the training length.
    """
    if horizon != "auto":
        return int(horizon)
    found = [auto_horizon(kernel, model.config.max_length) for kernel in kernels(model)]
    return max(n if n is not None else model.config.max_length for n in found)


def convert_model(model: CausalLM, *, method: str = "etsc", horizon: int | str = "auto") -> CausalLM:
    """A converted copy of ``model``, in eval mode; the trained one is left alone.

    Args:
        model: in its parallel form.
        method: ``etsc`` or ``window``.
        horizon: lags that must be right, or ``auto``.

    Raises:
        UserError: if the model is converted already, or a kernel can't be converted.
    """
    n = model_horizon(model, horizon)
    return attach(model, [convert_kernel(kernel, method=method, horizon=n) for kernel in kernels(model)])


def attach(model: CausalLM, layers: list[SSMParams]) -> CausalLM:
    """A copy of ``model`` whose long convolutions are replaced by the given recurrences."""
    # Kernels are not copied: the recurrences stand in their place.
    memo = {id(block.mixer.conv): None for block in model.layers}
    converted = copy.deepcopy(model, memo)
    for block, params in zip(converted.layers, layers, strict=True):
        block.mixer.conv = RecurrentConv(params)
    return converted.eval().requires_grad_(False)


def kernels(model: CausalLM) -> list[Kernel]:
    """The kernel of every layer.

    Raises:
        UserError: if the model is converted already.
    """
    found = [block.mixer.conv for block in model.layers]
    parallel = [conv.kernel for conv in found if isinstance(conv, LongConv)]
    if len(parallel) < len(found):
        raise UserError("this model is converted already: convert the checkpoint it came from")
    return parallel


def recurrences(model: CausalLM) -> list[SSMParams]:
    """The recurrence of every layer of a converted model."""
    found = [block.mixer.conv for block in model.layers]
    return [conv.params for conv in found if isinstance(conv, RecurrentConv)]
