"""Causal convolution by cuDNN's ``fft_causal_conv1d``, from cuDNN 9.26 and the package nvidia-cudnn-frontend.

Neither is a dependency; :mod:`tnnlm.ops.conv_backends` checks whether they work.
"""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from tnnlm.ops.circular import transform_dtype


def causal_conv(x: Tensor, k: Tensor) -> Tensor:
    """Return the causal convolution of x (B, L, E) with the taps k (E, K), which is differentiable.

    As in :func:`tnnlm.ops.toeplitz.toeplitz`, products are computed in the wider dtype of inputs and taps, at
    least float32, and rounded once.

    Raises:
        ImportError: If the package is not installed.
    """
    dtype = transform_dtype(x, k)
    rows = x.transpose(1, 2).to(dtype).contiguous()
    y: Tensor = import_module("cudnn").ops.fft_causal_conv1d(rows, k.to(dtype).contiguous())
    return y.transpose(1, 2).to(x.dtype)
