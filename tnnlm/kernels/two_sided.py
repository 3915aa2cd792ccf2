"""Bidirectional kernels: one kernel defined at negative lags, or two causal kernels, one per direction.

The TNN paper (arXiv 2305.04749) evaluates one position network at lags of both signs; S4 (arXiv 2111.00396)
and SGConv (arXiv 2210.09298) apply a second causal kernel to the reversed sequence, shifted by one such that
its tap j acts at lag -(j + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.kernels.base import KernelConfig, LagKernel, build_kernel


class TwoSidedKernel(nn.Module):
    """Bidirectional kernel k, with k[i] = kernel[i] for i >= 0.

    For i < 0, k[i] is the same kernel at lag i, or tap -i - ``reverse_lag`` of a second kernel. With
    ``reverse_lag`` = 0, tap 0 of the second kernel is not used, because lag 0 belongs to the first.
    """

    def __init__(self, config: KernelConfig, n_channels: int, max_length: int) -> None:
        """Build one or two kernels with :func:`tnnlm.kernels.build_kernel`."""
        super().__init__()
        self.kernel = build_kernel(config, n_channels, max_length)
        self.reverse = None
        self.reverse_lag = config.reverse_lag
        if not isinstance(self.kernel, LagKernel):
            self.reverse = build_kernel(config, n_channels, max_length)
            if self.reverse_lag:
                self.reverse.leave_lag_zero()

    def forward(self, length: int) -> Tensor:
        """Return the taps of lags -(``length`` - 1) .. ``length`` - 1 in order, (E, 2 ``length`` - 1)."""
        if self.reverse is None:
            assert isinstance(self.kernel, LagKernel)
            return self.kernel.between(1 - length, length)
        future = self.reverse(length)[:, 1 - self.reverse_lag : length - self.reverse_lag]
        return torch.cat((future.flip(1), self.kernel(length)), dim=1)

    def folded(self, length: int) -> Tensor:
        """Return the two directions as separate channels, (2 E, ``length``), index = distance.

        Channels of the second half hold the negative lags and are zero at distance 0.
        """
        k = self(length)
        future = nn.functional.pad(k[:, : length - 1].flip(1), (1, 0))
        return torch.cat((k[:, length - 1 :], future))
