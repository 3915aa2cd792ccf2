"""Comparison of certificates with recurrences that are computed in another way, in higher precision.

Recurrences are run step by step in extended precision, or with 50 digits where residues cancel each other.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import torch
from torch import Tensor

from tnnlm.checkpoints.certificate import ConversionReport
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.recurrence import Params
from tnnlm.ops.ssm import SSMParams

CANCELLING = 1e6
"""Ratio of residues to taps from which 50 digits are used."""


def check_certificate(report: ConversionReport, params: Params, k: Tensor, horizon: int, length: int) -> None:
    """Compare a certificate with errors over ``length`` lags, where k is zero past its last tap."""
    assert not any(math.isnan(v) for v in vars(report).values() if isinstance(v, float))
    scale = float(k.double().abs().max()) or 1.0
    whole = np.pad(k.double().numpy() / scale, ((0, 0), (0, length - k.shape[1])))
    difference = np.abs(whole - _dense_taps(params, length, scale))
    size = np.linalg.norm(whole[:, :horizon])
    error = np.linalg.norm(difference[:, :horizon])
    # The certificate's taps are rounded to float64, in proportion to the residues.
    rounding = 1e-13 * _largest_weight(params, scale) * math.sqrt(length * len(whole))
    assert error <= report.relative_tap_error * size * (1 + 1e-6) + rounding
    l1 = np.abs(whole).sum(1)
    allowed = report.l1_error * np.where(l1 > 0, l1, l1.max()) if math.isfinite(report.l1_error) else np.inf
    assert (difference.sum(1) <= allowed * (1 + 1e-6) + rounding * length).all()
    assert _largest_pole(params) <= report.largest_pole * (1 + 1e-6) + 1e-12
    assert report.hankel_ratio is None or report.hankel_ratio >= 1


def _dense_taps(params: Params, length: int, scale: float) -> np.ndarray:
    """Return the taps of a recurrence divided by ``scale``, (E, ``length``), independently of ``taps``."""
    if isinstance(params, CompanionParams):
        a, c, d = (p.double().numpy().astype(np.longdouble) for p in params[::-1])
        a = np.repeat(a, len(c) // len(a), axis=0)
        state, found = np.zeros_like(c), np.zeros((len(c), length), dtype=np.longdouble)
        for t in range(length):
            x = np.longdouble(t == 0)
            found[:, t] = d * x + (c * state).sum(1)
            state = np.concatenate(((x - (a * state).sum(1))[:, None], state[:, :-1]), axis=1)
        return (found / scale).astype(np.float64)
    if not isinstance(params, SSMParams):
        return _impulse_response(params, length) / scale
    window, poles, residues = (p.double().numpy() for p in params)
    shape = residues[:, 0].shape
    lam = np.broadcast_to(poles[..., 0, :] + 1j * poles[..., 1, :], shape)
    c = residues[:, 0] / scale + 1j * (residues[:, 1] / scale)
    found = (
        _modes_in_digits(lam, c, length) if np.abs(c).sum(initial=0) > CANCELLING else _modes(lam, c, length)
    )
    width = min(length, window.shape[1])
    found[:, :width] += window[:, :width] / scale
    return found


def _impulse_response(params: Params, length: int) -> np.ndarray:
    """Return the outputs of single steps for an impulse, (E, ``length``)."""
    params = type(params)(*(p.double() for p in params))
    state, outputs = params.init_state(1), []
    for t in range(length):
        x = torch.full((1, len(params.taps(1))), float(t == 0), dtype=torch.float64)
        y, state = params.step(x, state)
        outputs.append(y[0])
    return torch.stack(outputs, dim=1).numpy()


def _modes(lam: np.ndarray, c: np.ndarray, length: int) -> np.ndarray:
    lam, state = lam.astype(np.clongdouble), c.astype(np.clongdouble)
    found = np.zeros((len(c), length), dtype=np.longdouble)
    for t in range(length):
        found[:, t] = state.real.sum(1)
        state = state * lam
    return found.astype(np.float64)


def _modes_in_digits(lam: np.ndarray, c: np.ndarray, length: int) -> np.ndarray:
    found = np.zeros((len(c), length))
    with mpmath.workdps(50):
        for e, (poles, residues) in enumerate(zip(lam, c, strict=True)):
            pairs = [(mpmath.mpc(p), mpmath.mpc(r)) for p, r in zip(poles, residues, strict=True)]
            for t in range(length):
                found[e, t] = float(mpmath.fsum(r.real for _, r in pairs))
                pairs = [(p, p * r) for p, r in pairs]
    return found


def _largest_weight(params: Params, scale: float) -> float:
    weights = [float(p.double().abs().max()) / scale for p in params if p.numel() and p is not params[1]]
    return max([1.0, *weights])


def _largest_pole(params: Params) -> float:
    if isinstance(params, CompanionParams):
        rows = params.denominator.double().numpy()
        return max(float(np.abs(np.roots([1.0, *row])).max(initial=0)) for row in rows)
    if isinstance(params, SSMParams) and params.poles.numel():
        return float(np.hypot(*params.poles.double().numpy().swapaxes(0, -2)).max())
    return 0.0
