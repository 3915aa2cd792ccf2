"""Dtype and gradients that the circular convolutions of the FFT backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from tnnlm.precision import working_dtype


def transform_dtype(x: Tensor, k: Tensor) -> torch.dtype:
    """Return the real dtype of the transforms of inputs and taps."""
    return torch.promote_types(working_dtype(x.dtype), working_dtype(k.dtype))


def register_gradients(conv: CustomOpDef, backward: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Make the op of a circular convolution differentiable in its inputs and taps.

    Args:
        conv: Op of x (E, B, L), k (E, K) and the number of points n, which returns the outputs and what the
            backward pass needs.
        backward: Op of the gradient of the outputs, what ``conv`` returned for the backward pass, n and K,
            which returns the gradients of x and k.
    """

    def keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, ...]) -> None:
        _, k, ctx.n = inputs
        ctx.k_dtype, ctx.taps = k.dtype, k.shape[1]
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        # Or the backward pass would fill gradients of the spectra with zeros.
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
        x_grad, k_grad = backward(grad, *ctx.saved_tensors, ctx.n, ctx.taps)
        return x_grad, k_grad.to(ctx.k_dtype), None

    conv.register_autograd(gradients, setup_context=keep)
