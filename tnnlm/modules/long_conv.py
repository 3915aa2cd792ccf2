"""Parallel form of a long convolution, causal or bidirectional: taps applied by FFT."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn

from tnnlm.errors import CheckpointError
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.ops.recurrence import State
from tnnlm.ops.toeplitz import toeplitz, toeplitz_two_sided


class ParallelConv(nn.Module):
    """Base class of convolutions without a state, which can be trained but can't decode."""

    def init_state(self, batch_size: int) -> NoReturn:
        """Raise an error: the parallel form has no state."""
        raise _not_converted()

    def prefill(self, x: Tensor, state: State, lengths: Tensor | None = None) -> NoReturn:
        """Raise an error: the parallel form has no state."""
        raise _not_converted()

    def step(self, x: Tensor, state: State, active: Tensor | None = None) -> NoReturn:
        """Raise an error: the parallel form has no state."""
        raise _not_converted()

    def steps(self, x: Tensor, state: State) -> NoReturn:
        """Raise an error: the parallel form has no state."""
        raise _not_converted()


def _not_converted() -> CheckpointError:
    return CheckpointError(
        "model: is in its parallel form and can't decode",
        "convert it with convert.py or tnnlm.convert_model(model)",
    )


class LongConv(ParallelConv):
    """Causal convolution of each channel with the taps of a kernel; it can't decode before conversion."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor, *features: Tensor) -> Tensor:
        """Return the outputs (B, L, E) for x (B, L, E).

        ``features`` of the kernel are passed to it, if the model has computed them already.
        """
        return toeplitz(x, self.kernel(x.shape[1], *features))


class TapsConv(ParallelConv):
    """Causal convolution of each channel with fixed taps, the parallel form of a recurrence."""

    taps: Tensor

    def __init__(self, taps: Tensor) -> None:
        """Hold the taps (E, K), index = lag; later taps are zero."""
        super().__init__()
        self.register_buffer("taps", taps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, L, E) for x (B, L, E)."""
        return toeplitz(x, self.taps)


class BiConv(ParallelConv):
    """Bidirectional convolution of each channel, y[t] = sum over s of k[t-s] x[s].

    It has no recurrent form. Inputs at padding positions must be zero.
    """

    def __init__(self, kernel: TwoSidedKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, L, E) for x (B, L, E)."""
        return toeplitz_two_sided(x, self.kernel(x.shape[1]))
