"""Recurrences that a run attaches to its checkpoints, on paper: their parameters without values.

A few channels of the initial kernel are converted; the other channels take the same size.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.config.schema import Config, ModelConfig
from tnnlm.conversion import auto_horizon, convert_kernel
from tnnlm.kernels import Kernel, build_kernel
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams

ASSUMED_MODES = 64
"""Modes per layer of a recurrence whose number of modes follows from the trained weights."""
_SAMPLED = 13
"""Channels of a kernel that are converted to find the size of its recurrence."""
_CHOSEN_BY_WEIGHTS = ("auto", "balanced", "gradient")
"""Methods whose recurrences have a size that follows from the weights."""


class Attached(NamedTuple):
    """Recurrences that a run attaches to its checkpoints."""

    horizon: int
    """Number of lags that they reproduce, at the initial weights."""
    layer: Params
    """Parameters of the recurrence of one layer, without values: tensors on the meta device."""

    def nbytes(self, layers: int) -> int:
        """Return the size of the recurrences of ``layers`` layers, in bytes."""
        return layers * sum(part.nbytes for part in self.layer)


def attached_recurrences(config: Config) -> Attached:
    """Return the recurrences that a run of task causal attaches, from a conversion of a few channels.

    The number of modes of a method that finds it by the weights is ``ASSUMED_MODES``, or half of
    ``conversion.order``.

    Raises:
        UserError: If the kernel can't be converted.
    """
    model, recipe = config.model, copy.copy(config.conversion)
    channels = model.expand * model.d_model
    kernel = _sampled_kernel(model, channels)
    sample = kernel.n_channels
    if recipe.horizon == "auto":
        recipe.horizon = auto_horizon(kernel, model.max_length) or model.max_length
    horizon = int(recipe.horizon)
    if recipe.method in _CHOSEN_BY_WEIGHTS:
        modes = ASSUMED_MODES if recipe.order is None else (recipe.order + 1) // 2
        poles = (channels, 2, modes) if recipe.poles == "channel" else (2, modes)
        layer: Params = SSMParams(
            torch.empty(channels, recipe.window_taps, device="meta"),
            torch.empty(poles, dtype=torch.float64, device="meta"),
            torch.empty(channels, 2, modes, device="meta"),
        )
        return Attached(horizon, layer)
    found = convert_kernel(kernel, recipe, horizon, max_length=model.max_length).params
    return Attached(horizon, type(found)(*(_widened(part, sample, channels) for part in found)))


def _sampled_kernel(model: ModelConfig, channels: int) -> Kernel:
    """Return an initial kernel of a few of the channels, or of all if it can't be built for a few.

    Its weights are the same in every call.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)  # the horizon depends on the weights, and the same run needs the same memory
        if channels > _SAMPLED:
            with suppress(Exception):  # such as of kernels with parameters for equal groups of channels
                return build_kernel(model.kernel, _SAMPLED, model.max_length)
        return build_kernel(model.kernel, channels, model.max_length)


def _widened(part: Tensor, sample: int, channels: int) -> Tensor:
    """Return a tensor without values, with ``channels`` entries in place of ``sample`` along axis 0."""
    per_channel = part.dim() > 0 and part.shape[0] == sample
    shape = (channels, *part.shape[1:]) if per_channel else part.shape
    return torch.empty(shape, dtype=part.dtype, device="meta")
