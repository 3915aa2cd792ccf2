"""What serves a finite, rough kernel best, SGConv's above all: the trade of state against error, measured.

Four ways to hold a kernel of L lags: its window (L - 1 numbers per channel, exact), balanced reduction with
shared poles, with poles per channel, each with or without window taps, and a multi-rate summary of the
inputs. The last follows SGConv's scales: where the kernel is stretched by s, inputs are kept as ``moments``
sums per cell of s inputs instead of one by one. Cells stand still while the kernel moves along, so that
at most steps a knot of the kernel lies inside a cell: what moments can't express is its error.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tnnlm.conversion import balanced, convert_model
from tnnlm.conversion.linalg import compress, hankel_svd
from tnnlm.conversion.methods import relative_error
from tnnlm.evaluation import NLL, add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.kernels import SGConvKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.ops.ssm import SSMParams

ORDERS = (16, 32, 64, 128, 192, 256)
"""state numbers per channel"""
CHANNEL_ORDERS = (16, 32, 64)
"""the same, with poles per channel"""
WINDOW_TAPS = 32
_PHASES = 16
"""positions of the cells against the kernel that a multi-rate error is the mean of"""
_RANK = 64
"""combinations of channels that the bound is taken of: fewer make it smaller, and still a bound"""


def finite_forms(model: CausalLM, rows: dict[int, Tensor], chunk: int = 256) -> list[dict[str, Any]]:
    """Tap error and perplexity of every form, by state numbers per channel.

    Args:
        model: in its parallel form.
        rows: held-out token ids (R, L + 1) by length L.
        chunk: tokens per prefill.

    Returns:
        rows with ``form``, ``order`` (state numbers per channel), ``error`` (of the worst layer),
        ``bound`` (below the Hankel-norm error of any recurrence of that order with shared poles, over the
        kernel's Hankel norm), ``gap``: length -> relative gap of the perplexity; None where a form has
        no such number.
    """
    length = max(_support(kernel) for kernel in kernels(model))
    with torch.no_grad():
        taps = [kernel(length) for kernel in kernels(model)]
    sigma = [hankel_svd(compress(k, _RANK).unsqueeze(0), max(ORDERS) + 1)[0][0] for k in taps]
    parallel = {n: add([parallel_nll(model, row[None]) for row in tokens]).ppl for n, tokens in rows.items()}
    found = []
    plans = [
        (f"balanced, {poles} poles", order, poles, 0) for poles in ("shared", "channel") for order in ORDERS
    ]
    plans += [
        ("balanced, shared poles behind 32 window taps", order, "shared", WINDOW_TAPS) for order in ORDERS
    ]
    plans = [plan for plan in plans if plan[2] == "shared" or plan[1] in CHANNEL_ORDERS]
    plans = [plan for plan in plans if plan[3] + 8 <= plan[1] < length]
    for name, order, poles, width in tqdm(plans, desc="forms", disable=None):
        layers = [_reduced(k, order, poles, width) for k in taps]
        converted = attach(model, layers)
        found.append(
            {
                "form": name,
                "order": order,
                "error": max(relative_error(k, params) for k, params in zip(taps, layers, strict=True)),
                "bound": max(float(s[order] / s[0]) for s in sigma) if poles == "shared" else None,
                "gap": _gaps(converted, rows, parallel, chunk),
            }
        )
    for moments in (1, 2, 3):
        measured = [
            multirate(kernel, moments) for kernel in kernels(model) if isinstance(kernel, SGConvKernel)
        ]
        if measured:
            found.append(
                {"form": f"multi-rate, {moments} per cell", "order": measured[0][0]}
                | {"error": max(error for _, error in measured), "bound": None, "gap": {}}
            )
    exact = convert_model(model, method="window", horizon=length)
    gaps = _gaps(exact, rows, parallel, chunk)
    row = {"form": "window", "order": length - 1, "error": 0.0, "bound": None, "gap": gaps}
    return [*found, row]


def multirate(kernel: SGConvKernel, moments: int) -> tuple[int, float]:
    """State numbers per channel of a multi-rate summary, and the relative error of its taps.

    The best that sums of inputs times 1, l, l^2, ... over cells of each scale's stretch can do: a
    least-squares fit of the kernel on every cell, averaged over the cells' positions.
    """
    with torch.no_grad():
        k = kernel(kernel.length).double()
    width = kernel.scales.shape[2]
    bounds = [0, *(width << index for index in range(kernel.scales.shape[0]))]
    missed, states = 0.0, 0
    for phase in range(_PHASES):
        states = 0
        for index, (start, stop) in enumerate(pairwise(bounds)):
            stop, stretch = min(stop, kernel.length), 1 << max(0, index - 1)
            if stretch <= moments:
                states += stop - start
                continue
            offset = phase * stretch // _PHASES
            inner = [edge for edge in range(start - stretch + offset, stop, stretch) if edge > start]
            states += moments * (len(inner) + 1)
            for low, high in pairwise([start, *inner, stop]):
                lags = torch.arange(high - low, dtype=torch.float64)
                basis = torch.stack([lags**power for power in range(min(moments, high - low))], dim=1)
                basis = torch.linalg.qr(basis)[0]
                part = k[:, low:high]
                missed += float((part - part @ basis @ basis.T).square().sum())
    return states, math.sqrt(missed / _PHASES / float(k.square().sum()))


def _support(kernel: torch.nn.Module) -> int:
    if not isinstance(kernel, SGConvKernel):
        raise TypeError(f"expected an SGConv kernel, got {type(kernel).__name__}")
    return kernel.length


def _reduced(k: Tensor, order: int, poles: str, width: int) -> SSMParams:
    return balanced(k, order=order, poles=poles, window_taps=width, finite=True).to_dtype(k.dtype)


def _gaps(
    converted: CausalLM, rows: dict[int, Tensor], parallel: dict[int, float], chunk: int
) -> dict[int, float]:
    gaps = {}
    for length, tokens in rows.items():
        scores: list[NLL] = [recurrent_nll(converted, row[None], chunk) for row in tokens]
        gaps[length] = ppl_gap(parallel[length], add(scores).ppl)
    return gaps
