"""Key map of SGConv (arXiv 2210.09298) in stacks of residual layers.

The sub-kernels are concatenated, as in the mode ``cat_randn``, the default of the authors.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tnnlm.checkpoints.importers.keys import Keys, Plan, Rule
from tnnlm.checkpoints.importers.stack import Stack

MARK = r"layers\.\d+\.layer\.(\w+\.)*kernel_list\.\d+"
"""Key that only this format has, after a prefix."""


def plan(keys: Keys) -> Plan:
    """Return the settings and the key map of a checkpoint.

    Raises:
        CheckpointError: If a key that determines a size is missing.
    """
    stack = Stack(keys, r"kernel_list\.0")
    first = stack.conv(0)
    _, _, kernel_dim = keys.shape(f"{first}kernel_list.0", 3)
    scales = keys.count(rf"{re.escape(first)}kernel_list\.(\d+)")
    made = stack.plan
    made.settings |= {
        "model.kernel.name": "sgconv",
        "model.kernel.kernel_dim": kernel_dim,
        "model.kernel.length": kernel_dim << (scales - 1),
    }
    made.ignored = (r".*\.kernel_norm_initialized",)
    made.free = ("model.kernel.length",)

    def powers(multiplier: Tensor) -> Tensor:
        """Return the amplitudes of the sub-kernels, (scales, E), of which the last is 1."""
        exponents = torch.arange(scales - 1, -1, -1, dtype=multiplier.dtype)
        return multiplier.flatten() ** exponents[:, None]

    for index in range(stack.n_layers):
        theirs, kernel = stack.conv(index), stack.kernel(index)
        made.rules |= {
            f"{kernel}.scales": Rule(tuple(f"{theirs}kernel_list.{scale}" for scale in range(scales))),
            f"{kernel}.skip": Rule((f"{theirs}D",), _one_direction),
            f"{kernel}.amplitudes": Rule((f"{theirs}multiplier",), powers),
            f"{kernel}.initial_norm": Rule((f"{theirs}kernel_norm",), torch.flatten),
        }
    return made


def _one_direction(tensor: Tensor) -> Tensor:
    """Return a tensor without its first axis, which has the size 1 for a causal kernel."""
    return tensor.squeeze(0)
