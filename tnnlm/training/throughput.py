"""Training metrics: throughput, FLOP/s, data-loading time, gradient norm, and the memory of the kernels.

The gradient norm comes from clipping and FLOPs from the configuration. Effective length and Hankel order of
each layer tell which layers learn long memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import lightning
import torch
from torch import Tensor

from tnnlm.config.schema import Config
from tnnlm.conversion.linalg import compress, hankel_svd
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.machine.resident import resident_peak
from tnnlm.training.estimate import guessed_share
from tnnlm.training.flops import flops_per_token
from tnnlm.training.loggers.names import LENGTH, ORDER

ENERGY = 0.99
"""Share of a kernel's energy within its effective length."""
LARGEST_ORDER = 64
"""Upper limit of the reported order; a layer at the limit may need a higher order."""


class KernelMemory(NamedTuple):
    """Memory of a layer: how far it looks back, and the size of the state that this needs."""

    length: int
    """Effective length in lags: the smallest with ``ENERGY`` of the energy summed over all channels."""
    order: int
    """Smallest order of a recurrence, shared by all channels, within the tolerance in the Hankel norm.

    This is the number of Hankel singular values above ``tolerance`` times the largest (Adamyan, Arov, Krein).
    """


@torch.no_grad()
def kernel_memory(k: Tensor, tolerance: float) -> KernelMemory | None:
    """Measure the memory of taps k (E, L); return None if they are not finite or all zero."""
    energy = k.double().square().sum(0)
    total = float(energy.sum())
    if not math.isfinite(total) or total == 0:
        return None
    length = int((energy.cumsum(0) < ENERGY * total).sum()) + 1
    # Combinations of channels below a tenth of the tolerance can't have a singular value above it.
    sigma = hankel_svd(compress(k, LARGEST_ORDER, drop=tolerance / 10).unsqueeze(0), LARGEST_ORDER)[0][0]
    return KernelMemory(min(length, k.shape[1]), int((sigma > tolerance * sigma[0]).sum()))


@torch.no_grad()
def memory_values(
    layers: Sequence[Kernel | TwoSidedKernel], length: int, tolerance: float
) -> dict[str, float]:
    """Return effective length and order of every layer by metric name, on the ``length`` taps of training.

    The two directions of a bidirectional kernel count as separate channels, because each needs a recurrence;
    a lag is then a distance.
    """
    values: dict[str, float] = {}
    for index, kernel in enumerate(layers):
        k = kernel.folded(length) if isinstance(kernel, TwoSidedKernel) else kernel(length)
        found = kernel_memory(k, tolerance)
        if found is not None:
            values |= {f"{LENGTH}/{index}": found.length, f"{ORDER}/{index}": found.order}
    return values


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GiB: allocated on a GPU, resident of the process elsewhere; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_peak() / 2**30


class Throughput:
    """Metrics of the optimizer steps since the last row of the log."""

    def __init__(self, config: Config) -> None:
        self.flops = flops_per_token(config.model, config.data.batch_size, guessed_share(config))
        self.norms: list[Tensor] = []
        """Gradient norms before clipping, one per optimizer step."""
        self._last: tuple[int, float, float | None] = (0, 0.0, None)

    def start(self, step: int, waited: float | None) -> None:
        """Start the timers at ``step``: at the start of training, and after pauses such as validation.

        Args:
            step: Optimizer step.
            waited: Seconds that the training has waited for batches so far; None if nobody measures them.
        """
        self._last = (step, time.perf_counter(), waited)

    def read(
        self, trainer: lightning.Trainer, tokens_per_step: int, waited: float | None
    ) -> dict[str, float]:
        """Return means since the last call of ``read`` or ``start``, and restart the timers.

        Args:
            trainer: Trainer at the end of an optimizer step.
            tokens_per_step: Tokens per optimizer step on all ranks.
            waited: Seconds that the training has waited for batches so far; None if nobody measures them.

        Returns:
            Values by metric name.
        """
        (last_step, last_time, last_waited), step = self._last, trainer.global_step
        self.start(step, waited)
        now = self._last[1]
        seconds = (now - last_time) / (step - last_step)
        speed = tokens_per_step / seconds
        values = {
            "train/tokens_per_second": speed,
            "train/step_seconds": seconds,
            "train/tflops": self.flops * speed / trainer.world_size / 1e12,
        }
        if waited is not None and last_waited is not None:
            values["train/data_seconds"] = (waited - last_waited) / (step - last_step)
        memory = peak_memory(trainer.strategy.root_device)
        if memory:
            values["train/memory_gib"] = memory
        if self.norms:
            values["train/grad_norm"] = float(torch.stack(self.norms).mean())
        self.norms = []
        return values
