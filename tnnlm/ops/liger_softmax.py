"""Softmax of logits in place by Liger's Triton kernel, from the package liger-kernel, which is optional.

Liger's complete loss, ``LigerFusedLinearCrossEntropyFunction``, is not used: it waits twice for the GPU in
every call, to count the targets and to compare the incoming gradient with 1, and under float16 it stores
gradients that are divided by the number of tokens, most of which underflow. Its kernel has neither fault.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_LARGEST_BLOCK = 1 << 15
"""Largest number of logits that a program reads at once, as in Liger's own functions."""
_WARPS = 32


def scored_in_place(logits: Tensor, targets: Tensor, gain: float, ignored: int, *, slopes: bool) -> Tensor:
    """Return the summed cross-entropy of logits, which become the gradients of ``gain`` times the sum.

    One pass computes the loss and another the gradients, without a copy in float32. The target's entry is
    computed in float32 and rounded once.

    Args:
        logits: Contiguous rows (N, V) in float32, bfloat16 or float16 on a GPU.
        targets: Token ids (N,); rows of those equal to ``ignored`` get a gradient of 0 and no loss.
        gain: Factor of the gradients.
        ignored: Target that is not scored.
        slopes: Whether to compute the gradients; if not, the logits stay.

    Raises:
        Exception: If the package is missing, or another version whose kernel has other parameters.
    """
    size = logits.shape[1]
    # The kernel reads and writes at the target without a check.
    torch._assert_async(((targets == ignored) | ((targets >= 0) & (targets < size))).all())
    losses = logits.new_zeros(len(logits), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _kernel()[(len(logits),)](
            X_ptr=logits,
            X_stride=logits.stride(0),
            Y_ptr=targets,
            Y_stride=targets.stride(0),
            loss_ptr=losses,
            loss_stride=1,
            n_cols=size,
            # The mean divides the loss and its gradients by this number.
            reduction="mean",
            n_non_ignore=1 / gain,
            ignore_index=ignored,
            HAS_GRADIENTS=slopes,
            BLOCK_SIZE=min(_LARGEST_BLOCK, 1 << (size - 1).bit_length()),
            num_warps=_WARPS,
            **_UNUSED,
        )
    return losses.sum() / gain


_UNUSED: dict[str, Any] = {
    "weight_ptr": None,
    "z_loss_ptr": None,
    "token_accuracy_ptr": None,
    "token_accuracy_stride": 0,
    "predicted_tokens_ptr": None,
    "predicted_tokens_stride": 0,
    "sum_non_ignore_weight": 0.0,
    "weight_sum": 0.0,
    "lse_square_scale": 0.0,
    "label_smoothing": 0.0,
    "softcap": None,
    "RETURN_Z_LOSS": False,
    "RETURN_TOKEN_ACCURACY": False,
    "RETURN_PREDICTED_TOKENS": False,
    "HAS_WEIGHT": False,
    "HAS_SOFTCAPPING": False,
}
"""Parameters of the kernel for what this package does not use."""


@cache
def _kernel() -> Any:
    """Return the kernel; the import takes seconds, because Liger imports Transformers."""
    return import_module("liger_kernel.ops.cross_entropy").liger_cross_entropy_kernel
