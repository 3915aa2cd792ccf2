"""Causal convolution by cuDNN's ``fft_causal_conv1d``, from cuDNN 9.26 and the package nvidia-cudnn-frontend.

Neither is a dependency; :mod:`tnnlm.ops.conv_backends` checks whether they work.
"""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from tnnlm.precision import working_dtype


def causal_conv(x: Tensor, k: Tensor) -> Tensor:
    """Return the causal convolution of x (B, L, E) with the taps k (E, K), which is differentiable.

    As in :func:`tnnlm.ops.toeplitz.toeplitz`, bfloat16 inputs are computed in float32 and rounded once.

    Raises:
        ImportError: If the package is not installed.
    """
    dtype = working_dtype(x.dtype)
    rows = x.transpose(1, 2).to(dtype).contiguous()
    y: Tensor = import_module("cudnn").ops.fft_causal_conv1d(rows, k.to(dtype).contiguous())
    return y.transpose(1, 2).to(x.dtype)
