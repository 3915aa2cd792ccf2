"""The parallel form of a long convolution: a kernel's taps applied by FFT. Causal, or over both sides."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn

from tnnlm.errors import CheckpointError
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.ops.recurrence import State
from tnnlm.ops.toeplitz import toeplitz, toeplitz_two_sided


class ParallelConv(nn.Module):
    """What has no state: it trains, and can't decode."""

    def init_state(self, batch_size: int) -> NoReturn:
        """Always raises: this form has no state."""
        raise _not_converted()

    def prefill(self, x: Tensor, state: State, lengths: Tensor | None = None) -> NoReturn:
        """Always raises: this form has no state."""
        raise _not_converted()

    def step(self, x: Tensor, state: State, active: Tensor | None = None) -> NoReturn:
        """Always raises: this form has no state."""
        raise _not_converted()


def _not_converted() -> CheckpointError:
    return CheckpointError(
        "this model is in its parallel form and can't decode",
        "convert it first, with convert.py or tnnlm.convert_model(model)",
    )


class LongConv(ParallelConv):
    """y = k * x for every channel, with k from a kernel. Trains; can't decode before conversion."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        return toeplitz(x, self.kernel(x.shape[1]))


class BiConv(ParallelConv):
    """y[t] = sum over s of k[t-s] x[s] for every channel: every position sees all others. Has no recurrent
    form. Inputs at pads must be zero."""

    def __init__(self, kernel: TwoSidedKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        return toeplitz_two_sided(x, self.kernel(x.shape[1]))
