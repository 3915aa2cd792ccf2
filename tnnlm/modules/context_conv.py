"""Causal long convolution of sequences that are split over several processes (context parallelism)."""

from __future__ import annotations

from torch import Tensor

from tnnlm.kernels import Kernel
from tnnlm.modules.long_conv import LongConv
from tnnlm.ops.context import ContextGroup
from tnnlm.ops.toeplitz import toeplitz


class ContextConv(LongConv):
    """:class:`LongConv` on a shard of the sequence, with the same weights and state-dict names.

    Each process convolves all tokens of a share of the channels, so that the FFT stays whole. Gradients of
    the kernel are those of this share; their sum over the group is that of the whole convolution.
    """

    def __init__(self, kernel: Kernel, group: ContextGroup) -> None:
        super().__init__(kernel)
        self.group = group

    def forward(self, x: Tensor, *features: Tensor) -> Tensor:
        """Return the outputs (B, L / C, E) of this process's shard x (B, L / C, E)."""
        assert not features, "the model computes features only for convolutions that it runs alone"
        total = x.shape[2]
        whole = self.group.to_channels(x)
        k = self.kernel.channel_taps(whole.shape[1], self.group.channels(total))
        return self.group.to_tokens(toeplitz(whole, k), total)
