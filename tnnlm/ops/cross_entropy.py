"""Cross-entropy of a linear head whose logits are never stored for all tokens at once.

The logits of all tokens are the largest tensor in training: 6.6 GB in float32 for 32,768 tokens and 50,264
words, and as much for their gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tnnlm.ops.loss_backends import IGNORED, score
from tnnlm.ops.override import Override
from tnnlm.precision import working_dtype

_MOST_ON_GPU = 1 << 26
"""Largest number of logits that are computed at once on a GPU, whose products need many rows."""
_MOST_ON_CPU = 1 << 24
"""Largest number on a CPU, where a step with chunks of this size takes the time of one with all logits at
once; a quarter of it takes 4 % longer at 4,096 tokens and 10,240 words."""
_GAIN = 1024.0
"""Factor of probabilities in float16, so that small ones don't underflow; gradients are divided by it."""
_assumed: Override[str] = Override()


def linear_cross_entropy(
    features: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy in nats of the logits ``features @ weight.T``.

    Up to :func:`most_logits` logits are computed at once. More are computed in chunks of tokens, whose
    gradients are computed in the same pass, because the logits of a chunk are not kept for the backward pass.
    That takes as many products as keeping them does.

    Args:
        features: Inputs of the head, (N, D).
        weight: Weights of the head, (V, D), which may be those of a tied embedding.
        targets: Token ids, (N,); those equal to ``IGNORED`` are not scored.
        divisor: Scalar that divides the summed loss; None divides by the number of scored targets.

    Returns:
        Scalar in float32, or float64 for float64. Without ``divisor`` it is not a number if no target is
        scored.
    """
    rows = max(1, most_logits(features.device.type) // len(weight))
    if len(features) <= rows:
        logits = functional.linear(features, weight)
        logits = logits.to(working_dtype(logits.dtype))
        if divisor is None:
            return functional.cross_entropy(logits, targets)
        return functional.cross_entropy(logits, targets, reduction="sum") / divisor
    loss: Tensor = _Chunked.apply(features, weight, targets, rows, divisor)
    return loss


def most_logits(device: str) -> int:
    """Return the largest number of logits that are computed at once on a type of device."""
    return _MOST_ON_CPU if (_assumed.choice or device) == "cpu" else _MOST_ON_GPU


def limit_of(device: str) -> AbstractContextManager[None]:
    """Use the limit of a type of device on every device, to estimate the memory of another machine."""
    return _assumed.use(device)


def _product_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer of these inputs computes, which autocast may set."""
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return features.dtype


class _Chunked(torch.autograd.Function):
    """Loss of chunks of tokens, with gradients that are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, rows: int, divisor: Tensor | None
    ) -> Tensor:
        """Return the mean loss, and keep the gradients of its sum."""
        dtype = _product_dtype(features)
        wide = working_dtype(dtype)
        x, w = features.to(dtype), weight.to(dtype)
        gain = _GAIN if dtype == torch.float16 else 1.0
        of_features, of_weight = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if of_features else None
        dw = torch.zeros_like(w, dtype=wide) if of_weight else None
        total, scored = x.new_zeros((), dtype=wide), targets != IGNORED
        with torch.autocast(features.device.type, enabled=False):
            for start in range(0, len(x), rows):
                part = slice(start, start + rows)
                kept, given = scored[part, None], x[part]
                loss, slope = score(given, w, targets[part], gain, slopes=of_features or of_weight)
                total += loss
                if slope is None:
                    continue
                if dx is not None:
                    torch.mul(slope @ w, kept, out=dx[part])
                if dw is not None:
                    _add_product(dw, slope.T, given * kept / gain)
                del slope  # before the logits of the next chunk
        count = scored.sum() if divisor is None else divisor
        ctx.save_for_backward(dx, dw, count)
        ctx.gains = gain, 1.0
        ctx.dtypes = features.dtype, weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the sum."""
        *gradients, count = ctx.saved_tensors
        parts = zip(gradients, ctx.gains, ctx.dtypes, strict=True)
        scaled = (None if g is None else (g * (slope / count / gain)).to(dtype) for g, gain, dtype in parts)
        return *scaled, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product of two matrices to ``total``, whose dtype may be wider."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
