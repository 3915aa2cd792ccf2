"""Key map of RTF (arXiv 2405.06147) in stacks of residual layers.

The taps depend on the number of points at which the spectrum was sampled, ``trunc_len``, which is not in the
weights. The authors sample one point more if it is odd.
"""

from __future__ import annotations

from torch import Tensor

from tnnlm.checkpoints.importers.keys import Keys, Plan, Rule
from tnnlm.checkpoints.importers.stack import Stack

MARK = r"layers\.\d+\.layer\.(\w+\.)*ab$"
"""Key that only this format has, after a prefix."""


def plan(keys: Keys) -> Plan:
    """Return the settings and the key map of a checkpoint.

    Raises:
        CheckpointError: If a key that determines a size is missing.
    """
    stack = Stack(keys, "ab")
    rows, state_size = keys.shape(f"{stack.conv(0)}ab", 2)
    (channels,) = keys.shape(f"{stack.conv(0)}h_0", 1)
    groups = rows - channels
    made = stack.plan
    made.settings |= {
        "model.kernel.name": "rtf",
        "model.kernel.state_size": state_size,
        "model.kernel.denominators": groups,
    }
    made.required = {"model.max_length": "the trunc_len of the checkpoint, plus one if it is odd"}

    def below(ab: Tensor) -> Tensor:
        """Return the denominators, which are stored first."""
        return ab[:groups]

    def above(ab: Tensor) -> Tensor:
        """Return the numerators."""
        return ab[groups:]

    for index in range(stack.n_layers):
        theirs, kernel = stack.conv(index), stack.kernel(index)
        made.rules |= {
            f"{kernel}.denominator": Rule((f"{theirs}ab",), below),
            f"{kernel}.numerator": Rule((f"{theirs}ab",), above),
            f"{kernel}.direct": Rule((f"{theirs}h_0",)),
        }
    return made
