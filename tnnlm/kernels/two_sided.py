"""Taps at negative lags too: of one kernel that knows them, or of two, one per direction.

The TNN paper (arXiv 2305.04749) evaluates one position network at lags of both signs; S4 (arXiv 2111.00396)
and SGConv (arXiv 2210.09298) lay a second causal kernel over the future.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.kernels.base import KernelConfig, LagKernel, build_kernel


class TwoSidedKernel(nn.Module):
    """k[i] = kernel[i] for i >= 0; for i < 0 the same kernel at i, or a second one at -i.

    The second one's tap 0 isn't used: lag 0 belongs to the first.
    """

    def __init__(self, config: KernelConfig, n_channels: int, max_length: int) -> None:
        """Build one or two kernels by :func:`tnnlm.kernels.build_kernel`."""
        super().__init__()
        self.kernel = build_kernel(config, n_channels, max_length)
        self.reverse = None
        if not isinstance(self.kernel, LagKernel):
            self.reverse = build_kernel(config, n_channels, max_length)

    def forward(self, length: int) -> Tensor:
        """Taps of lags -(``length`` - 1) .. ``length`` - 1 in order, (E, 2 ``length`` - 1)."""
        if self.reverse is None:
            assert isinstance(self.kernel, LagKernel)
            return self.kernel.between(1 - length, length)
        return torch.cat((self.reverse(length)[:, 1:].flip(1), self.kernel(length)), dim=1)

    def folded(self, length: int) -> Tensor:
        """Both directions as channels of their own, (2 E, ``length``), index = distance; the second half
        has a zero at distance 0."""
        k = self(length)
        future = nn.functional.pad(k[:, : length - 1].flip(1), (1, 0))
        return torch.cat((k[:, length - 1 :], future))
