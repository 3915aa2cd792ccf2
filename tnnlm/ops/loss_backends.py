"""Choice of the implementation of softmax and its gradients in the loss, made once per device.

- ``torch``: operators of PyTorch, for every device and dtype.
- ``liger``: :mod:`tnnlm.ops.liger_softmax`; for GPUs with liger-kernel, except in float64.

A GPU uses Liger if it computes a small loss and its gradients correctly.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from tnnlm.ops.liger_softmax import scored_in_place
from tnnlm.ops.override import Override
from tnnlm.ops.triton_probe import check_close, why_it_fails
from tnnlm.precision import working_dtype

IGNORED = -100
"""Target that is not scored, as in :func:`torch.nn.functional.cross_entropy`."""
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_forced: Override[str] = Override()


def use_loss_backend(name: str) -> AbstractContextManager[None]:
    """Use one backend on every device, to compare backends."""
    return _forced.use(name)


def loss_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the backend for logits of a dtype on a device.

    If liger-kernel is installed and fails, this warns once and returns ``torch``.
    """
    if dtype == torch.float64:
        return "torch"
    if _forced.choice:
        return _forced.choice
    return "torch" if device.type != "cuda" or why_no_liger(device) else "liger"


@cache
def why_no_liger(device: torch.device) -> str:
    """Return why the backend ``liger`` doesn't run on a CUDA device; empty if it does."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    reason = why_it_fails("liger-kernel", device, _check)
    if reason:
        warnings.warn(f"the loss is computed without {reason}", stacklevel=2)
    return reason


def score(
    features: Tensor, weight: Tensor, targets: Tensor, gain: float, *, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed cross-entropy of the logits ``features @ weight.T``, and gradients of the logits.

    Args:
        features: Inputs of the head, (N, D).
        weight: Weights of the head, (V, D), in the dtype of ``features``.
        targets: Token ids (N,); those equal to ``IGNORED`` are not scored, and the gradients of their rows
            are not defined.
        gain: Factor of the gradients, so that small ones don't underflow in float16.
        slopes: Whether to return the gradients.

    Returns:
        The sum in float32, or float64 for float64, and the gradients (N, V) in the dtype of ``features``, or
        None.
    """
    if loss_backend(features.device, features.dtype) == "torch":
        return _by_torch(features, weight, targets, gain, slopes)
    logits = features @ weight.T
    total = scored_in_place(logits, targets, gain, IGNORED, slopes=slopes)
    return total, logits if slopes else None


def _by_torch(
    features: Tensor, weight: Tensor, targets: Tensor, gain: float, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    kept = (targets != IGNORED)[:, None]
    index = targets[:, None].where(kept, 0)
    # No variable refers to the logits, so that they are freed before the gradients are made.
    logp = torch.log_softmax(features @ weight.T, dim=-1, dtype=working_dtype(features.dtype))
    total = -logp.gather(1, index).mul_(kept).sum()
    if not slopes:
        return total, None
    # Gradient of the logits: the probabilities, minus one at the target.
    slope = logp.exp_().scatter_add_(1, index, logp.new_full(index.shape, -1.0))
    return total, (slope if gain == 1 else slope.mul_(gain)).to(features.dtype)


def _check(device: torch.device) -> None:
    """Compare Liger with PyTorch on a few rows, one of which is not scored.

    Raises:
        ArithmeticError: If they differ.
    """
    targets = torch.tensor([3, IGNORED, 0, 699], device=device)
    steps = torch.arange(704 * 4, dtype=torch.float32, device=device).mul_(0.7).sin_().view(704, 4)
    for dtype, tolerance in _TOLERANCES.items():
        features, weight = (3 * steps[700:]).to(dtype), steps[:700].to(dtype)
        expected, slope = _by_torch(features, weight, targets, 8.0, True)
        assert slope is not None
        logits = features @ weight.T
        total = scored_in_place(logits, targets, 8.0, IGNORED, slopes=True)
        for got, right in ((total, expected), (logits, slope * (targets != IGNORED)[:, None])):
            check_close(got, right, tolerance)
