"""Slow reference implementations for tests and ``convert.py --verify``."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.multirate import MultirateParams
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams


def toeplitz_dense(x: Tensor, k: Tensor) -> Tensor:
    """Return the causal convolution of x (B, L, E) and taps k (E, K), computed with L x L matrices."""
    length = x.shape[1]
    k = torch.nn.functional.pad(k[:, :length], (0, max(0, length - k.shape[1])))
    lag = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    matrix = torch.where(lag >= 0, k[:, lag.clamp(min=0)], torch.zeros((), dtype=k.dtype))
    return torch.einsum("etj,bje->bte", matrix, x)


def toeplitz_two_sided_dense(x: Tensor, k: Tensor) -> Tensor:
    """Return the bidirectional convolution of x (B, L, E) and taps k (E, 2K - 1), lag 0 in the middle."""
    length, centre = x.shape[1], k.shape[1] // 2
    k = torch.nn.functional.pad(k, (max(0, length - 1 - centre),) * 2)
    lag = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return torch.einsum("ets,bse->bte", k[:, lag + k.shape[1] // 2], x)


def recurrence_loop(params: Params, x: Tensor) -> Tensor:
    """Return the outputs of the recurrence for x (B, L, E), computed in float64.

    They are computed by a loop over tokens, and those of a multi-scale kernel by matrices of its taps.
    """
    if isinstance(params, CompanionParams):
        return _companion_loop(params, x)
    if isinstance(params, MultirateParams):
        return toeplitz_dense(x.double(), params.taps(x.shape[1]))
    assert isinstance(params, SSMParams)
    return _modes_loop(params, x)


def _companion_loop(params: CompanionParams, x: Tensor) -> Tensor:
    """Return the outputs of s = A s + B x with the companion matrix A; the newest value of w is s[0]."""
    direct, c, a = (part.double() for part in params)
    channels, n = c.shape
    a = a.repeat_interleave(channels // len(a), dim=0)
    matrix = torch.zeros(channels, n, n, dtype=torch.float64)
    matrix[:, 1:, :-1] = torch.eye(n - 1, dtype=torch.float64)
    matrix[:, 0] = -a
    x = x.double()
    state = torch.zeros(x.shape[0], channels, n, dtype=torch.float64)
    outputs = []
    for token in x.unbind(1):
        outputs.append(direct * token + (c * state).sum(-1))
        state = torch.einsum("eij,bej->bei", matrix, state)
        state[..., 0] += token
    return torch.stack(outputs, dim=1)


def _modes_loop(params: SSMParams, x: Tensor) -> Tensor:
    poles = torch.complex(*params.poles.double().unbind(-2))
    residues = torch.complex(*params.residues.double().unbind(-2))
    window = params.window.double()
    x = x.double()
    state = torch.zeros(x.shape[0], *residues.shape, dtype=torch.complex128)
    outputs = []
    for t in range(x.shape[1]):
        state = poles * state + x[:, t, :, None]
        y = (residues * state).sum(-1).real
        for lag in range(min(t + 1, window.shape[1])):
            y = y + window[:, lag] * x[:, t - lag]
        outputs.append(y)
    return torch.stack(outputs, dim=1)
