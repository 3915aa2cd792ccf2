"""Base class of kernels that are small networks, whose features for several layers are one batch.

A network of six hidden layers on 2,048 lags is dozens of operators on 131,072 numbers, each too small for a
GPU. The layers of a model have networks of equal shapes, which one operator computes for all of them. Only
the last layer of the network, which gives the taps of all channels, is left to each kernel: its product is
large, and its results for all layers would take memory at the same time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from tnnlm.kernels.base import Kernel


class NetworkKernel(Kernel):
    """Kernel whose taps are a function of the hidden features of a small network, of any shape (P, R)."""

    @abstractmethod
    def forward(self, length: int, features: Tensor | None = None) -> Tensor:
        """Return the first ``length`` taps, (E, ``length``).

        Args:
            length: Number of taps.
            features: Features of this kernel for this length, from :meth:`joint_features`, if they are known.
        """

    @property
    @abstractmethod
    def settings(self) -> tuple[Hashable, ...]:
        """Settings, besides the shapes of parameters, on which the features depend."""

    @classmethod
    @abstractmethod
    def joint_features(cls, kernels: Sequence[Self], length: int) -> Tensor:
        """Return the features (N, P, R) of N kernels for ``length`` taps.

        All kernels have the class ``cls`` and equal ``settings``, and parameters of equal shapes, whose
        gradients are those of a kernel that computes its features alone.
        """


def joint_linear(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Apply N linear layers of equal shape to x (N, P, R), and return (N, P, S)."""
    weights = torch.stack([layer.weight for layer in layers])
    biases = torch.stack([layer.bias for layer in layers])
    # As the first factor the weights get gradients that are contiguous, so that every layer's parameters can
    # keep views of them. Those of a transposed second factor would be copied, layer by layer.
    return torch.baddbmm(biases[:, :, None], weights, x.mT).mT
