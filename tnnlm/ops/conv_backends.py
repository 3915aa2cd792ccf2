"""Choice of the implementation of convolutions with gradients, made once per device.

- ``tiles``: transforms of tiles that fit the cache of a CPU, :mod:`tnnlm.ops.toeplitz`; for every device.
- ``windows``: few passes over memory, :mod:`tnnlm.ops.row_windows`; for GPUs with Triton.
- ``cudnn``: :mod:`tnnlm.ops.cudnn_conv`, causal products only; for GPUs with cuDNN 9.26.

A GPU uses the last of them that computes a small convolution and its gradients correctly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnnlm.ops import cudnn_conv
from tnnlm.ops.override import Override
from tnnlm.ops.row_windows import row_conv
from tnnlm.ops.triton_probe import check_close, why_it_fails, why_no_triton

_TOLERANCE = 1e-4
_forced: Override[str] = Override()


def use_backend(name: str) -> AbstractContextManager[None]:
    """Use one backend on every device for convolutions with gradients, to compare backends."""
    return _forced.use(name)


def training_backend(device: torch.device, causal: bool) -> str:
    """Return the name of the backend for convolutions with gradients on a device.

    Args:
        device: Device of the inputs.
        causal: Whether the convolution is causal.
    """
    if _forced.choice:
        return _forced.choice
    if device.type != "cuda":
        return "tiles"
    if causal and not why_no_cudnn(device):
        return "cudnn"
    return "tiles" if why_no_windows(device) else "windows"


# torch.compile calls the function instead of tracing the check. torch.compiler.assume_constant_result sets
# the same attribute, but imports the whole compiler.
training_backend.__dict__["_dynamo_marked_constant"] = True


@cache
def why_no_windows(device: torch.device) -> str:
    """Return why the backend ``windows`` doesn't run on a CUDA device; empty if it does."""
    return why_no_triton(device, lambda where: _check(where, _by_windows))


@cache
def why_no_cudnn(device: torch.device) -> str:
    """Return why the backend ``cudnn`` doesn't run on a CUDA device; empty if it does."""
    if find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return why_it_fails("cuDNN", device, lambda where: _check(where, cudnn_conv.causal_conv))


def _by_windows(x: Tensor, k: Tensor) -> Tensor:
    return row_conv(x.permute(2, 0, 1), k, 2 * x.shape[1])[0].permute(1, 2, 0)


def _by_lags(x: Tensor, k: Tensor) -> Tensor:
    shifted = (pad(x, (0, 0, lag, 0))[:, : x.shape[1]] for lag in range(k.shape[1]))
    return torch.stack([part * taps for part, taps in zip(shifted, k.T, strict=True)]).sum(dim=0)


def _check(device: torch.device, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compare a product and its gradients with a sum over lags.

    Raises:
        ArithmeticError: If they differ.
    """
    with torch.enable_grad():
        steps = torch.arange(240, dtype=torch.float32, device=device)
        x = steps.sin().view(3, 20, 4).requires_grad_()
        k = steps[:80].cos().view(4, 20).requires_grad_()
        found = []
        for function in (product, _by_lags):
            y = function(x, k)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, k))))
        for got, expected in zip(*found, strict=True):
            check_close(got, expected, _TOLERANCE)
