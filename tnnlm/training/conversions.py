"""Conversion of the kernels during training, shared by the validation and the checkpoints of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.config.schema import Config
from tnnlm.conversion import convert_kernels
from tnnlm.kernels import Kernel
from tnnlm.ops.recurrence import Params


class Converted(NamedTuple):
    """Recurrences of all layers."""

    horizon: int
    """Number of lags that they reproduce."""
    layers: list[Params]
    """Parameters of each layer's recurrence, on the device of the kernels."""


class SharedConversion:
    """Conversion by ``config.conversion`` that is repeated only if the kernels have changed.

    The weights themselves are compared, not the number of the step: averaged weights are swapped into the
    model for a validation, and sharded weights are gathered into new tensors.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._weights: list[Tensor] = []
        self._result: Converted | Exception | None = None

    def of(self, kernels: Sequence[Kernel]) -> Converted:
        """Return the recurrences of ``kernels``, one per layer.

        Raises:
            UserError: If a kernel can't be converted; the second time without another attempt.
        """
        weights = [tensor.detach() for kernel in kernels for tensor in kernel.state_dict().values()]
        if self._result is None or not _same(weights, self._weights):
            self._weights = [tensor.clone() for tensor in weights]
            try:
                horizon, layers = convert_kernels(
                    kernels, self.config.model.max_length, self.config.conversion
                )
                self._result = Converted(horizon, [layer.params for layer in layers])
            except Exception as error:  # the caller decides whether training continues
                self._result = error
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def release(self) -> None:
        """Free the recurrences and the copy of the weights."""
        self._weights, self._result = [], None


def _same(weights: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    pairs = zip(weights, before, strict=False)
    return len(weights) == len(before) and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )
