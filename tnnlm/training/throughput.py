"""What is watched while a run trains: the speed of its steps, and how long its kernels' memory grows.

Two clocks, the gradient norm that clipping computed anyway, floating-point operations worked out from
the configuration, and two numbers per layer that say which layers grow long memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from tnnlm.config.schema import Config, ModelConfig
from tnnlm.conversion.linalg import compress, hankel_svd
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.machine.resident import resident_peak
from tnnlm.ops.toeplitz import fft_length
from tnnlm.training.estimate import guessed_share
from tnnlm.training.loggers.names import LENGTH, ORDER

ENERGY = 0.99
"""share of a kernel's energy that its effective length holds"""
LARGEST_ORDER = 64
"""orders are counted up to here: a layer that shows it needs as many or more"""


class KernelMemory(NamedTuple):
    """How far a layer looks back, and how much it must remember to do so."""

    length: int
    """smallest number of lags that holds ``ENERGY`` of the energy of all channels together"""
    order: int
    """smallest order at which any recurrence can come within the tolerance (Hankel norm), shared
    by all channels: Hankel singular values above tolerance times the largest; by Adamyan, Arov, Krein"""


@torch.no_grad()
def kernel_memory(k: Tensor, tolerance: float) -> KernelMemory | None:
    """Measure taps k (E, L); None if they are not finite or all zero."""
    energy = k.double().square().sum(0)
    total = float(energy.sum())
    if not math.isfinite(total) or total == 0:
        return None
    length = int((energy.cumsum(0) < ENERGY * total).sum()) + 1
    # Combinations of channels below a tenth of the tolerance can't carry a singular value above it.
    sigma = hankel_svd(compress(k, LARGEST_ORDER, drop=tolerance / 10).unsqueeze(0), LARGEST_ORDER)[0][0]
    return KernelMemory(min(length, k.shape[1]), int((sigma > tolerance * sigma[0]).sum()))


@torch.no_grad()
def memory_values(
    layers: Sequence[Kernel | TwoSidedKernel], length: int, tolerance: float
) -> dict[str, float]:
    """Effective length and order of every layer, on the ``length`` taps that training uses; by name, for
    the log. Of two-sided kernels both directions count: a lag is a distance, a direction a recurrence of its
    own."""
    values: dict[str, float] = {}
    for index, kernel in enumerate(layers):
        k = kernel.folded(length) if isinstance(kernel, TwoSidedKernel) else kernel(length)
        found = kernel_memory(k, tolerance)
        if found is not None:
            values |= {f"{LENGTH}/{index}": found.length, f"{ORDER}/{index}": found.order}
    return values


def flops_per_token(config: ModelConfig, n_rows: int = 1, guessed: float = 1.0) -> float:
    """Floating-point operations per token of a training step: forward, and twice that backward.

    Counts 6 per weight of a matrix product (Kaplan et al. 2020), the head among them, and the
    convolutions by FFT, 2.5 n log2 n a transform: two forward and two backward of every row, four of
    the taps, shared by ``n_rows`` rows. The head counts for the share of tokens that are ``guessed``.
    Position networks, norms and gates are left out.
    """
    inner, hidden = config.expand * config.d_model, config.glu_dim or config.d_model
    layer = config.d_model * (3 * inner + 3 * hidden)
    n = fft_length(2 * config.max_length)
    transforms = (4 + 4 / n_rows) * 2.5 * n * math.log2(n) + 3 * 6 * (n // 2)
    convolution = inner * transforms / config.max_length
    head = guessed * config.d_model * config.vocab_size
    return 6 * (config.n_layers * layer + head) + config.n_layers * convolution


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on a GPU, resident of the process elsewhere; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_peak() / 2**30


class DataWait(Profiler):
    """Adds up the seconds that the training loop waited for batches: Lightning times that action."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0
        self._began = 0.0

    def start(self, action_name: str) -> None:
        """Lightning begins an action."""
        if action_name.endswith("train_dataloader_next"):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """And ends it."""
        if action_name.endswith("train_dataloader_next"):
            self.waited += time.perf_counter() - self._began


class Throughput:
    """Figures of the optimizer steps since the last row of the log."""

    def __init__(self, config: Config) -> None:
        self.flops = flops_per_token(config.model, config.data.batch_size, guessed_share(config))
        self.norms: list[Tensor] = []
        """of the gradient before clipping, one per step"""
        self._last = (0, 0.0, 0.0)

    def start(self, step: int, profiler: Any) -> None:
        """Start the clocks, at step 0 and after what is no training, as validation."""
        self._last = (step, time.perf_counter(), _waited(profiler))

    def read(self, trainer: lightning.Trainer, tokens_per_step: int) -> dict[str, float]:
        """Means since the last reading (or start), and the clocks start anew.

        Args:
            trainer: at a step border.
            tokens_per_step: on all ranks together.
        """
        (last_step, last_time, last_waited), step = self._last, trainer.global_step
        self.start(step, trainer.profiler)  # type: ignore[attr-defined]
        _, now, waited = self._last
        seconds = (now - last_time) / (step - last_step)
        speed = tokens_per_step / seconds
        values = {
            "train/tokens_per_second": speed,
            "train/step_seconds": seconds,
            "train/data_seconds": (waited - last_waited) / (step - last_step),
            "train/tflops": self.flops * speed / trainer.world_size / 1e12,
        }
        memory = peak_memory(trainer.strategy.root_device)
        if memory:
            values["train/memory_gib"] = memory
        if self.norms:
            values["train/grad_norm"] = float(torch.stack(self.norms).mean())
        self.norms = []
        return values


def _waited(profiler: Any) -> float:
    return profiler.waited if isinstance(profiler, DataWait) else 0.0
