"""Cost and error of every conversion against the number of taps and of channels.

The protocol of the ETSC paper (arXiv 2311.08756, section 4). Errors are of the stored numbers,
measured. Results are plain data; :mod:`experiments.comparison_plots` turns them into tables and pictures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.ablations import vandermonde, without_balancing
from tnnlm.conversion import balanced, etsc, gradient, window
from tnnlm.conversion.methods import relative_error
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels
from tnnlm.ops.ssm import SSMParams


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults take minutes."""

    lengths: tuple[int, ...] = (64, 256, 512, 1024, 4096, 16384)
    """taps n, at ``channels`` channels"""
    channels: int = 64
    widths: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """channels d, at ``width_length`` taps"""
    width_length: int = 2048
    order: int = 32
    """of balanced and gradient"""
    gradient_steps: int = 2000
    gradient_elements: int = 1 << 17
    """largest n d that gradient descent is run on"""
    vandermonde_length: int = 512
    """largest n whose Vandermonde system is solved"""
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16, 28)
    """contexts, in training lengths"""
    tokens: int = 1 << 14
    """held-out tokens scored per context, one row at the least"""
    ppl_orders: tuple[int, ...] = (4, 6, 8, 16, 32, 64)
    orders: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    layers: int | None = None
    """how many are held against the bound; None: all"""


QUICK = Sizes(
    lengths=(64, 256, 1024),
    widths=(64, 256, 1024),
    width_length=512,
    gradient_steps=100,
    gradient_elements=1 << 15,
    vandermonde_length=256,
    multiples=(1, 4),
    tokens=1 << 12,
    ppl_orders=(4, 16, 32),
    orders=(2, 4, 8, 16, 32),
    layers=2,
)
"""smaller sizes"""


class Taps(NamedTuple):
    """What the scaling is measured on."""

    k: Tensor
    """(E, T), float32"""
    decay: Tensor | None
    """(E,)"""


def kernel_taps(model: CausalLM, length: int) -> Taps:
    """The first layer's trained kernel, evaluated on ``length`` lags."""
    kernel = kernels(model)[0]
    with torch.no_grad():
        return Taps(kernel(length).float(), kernel.decay)


def random_taps(channels: int, length: int, decay: float = 0.99) -> Taps:
    """White noise under an exponential envelope: what no small recurrence fits."""
    noise = torch.randn(channels, length, generator=torch.Generator().manual_seed(0))
    rate = torch.full((channels,), decay, dtype=torch.float64)
    return Taps((noise * decay ** torch.arange(length, dtype=torch.float64)).float(), rate)


def scaling(source: Callable[[int], Taps], sizes: Sizes) -> list[dict[str, Any]]:
    """Relative tap error and seconds of every method, against the number of taps and of channels.

    Args:
        source: evaluates taps on a number of lags.
        sizes: n, d and the limits of the slow methods.

    Returns:
        rows with ``sweep`` ("length" or "width"), ``method``, ``n``, ``d``, ``seconds``, ``error``, and
        ``condition`` of a Vandermonde system; ``skipped`` instead where a method was left out.
    """
    cases = [("length", n, sizes.channels) for n in sizes.lengths]
    cases += [("width", sizes.width_length, d) for d in sizes.widths]
    rows = []
    with tqdm(total=len(cases) * 7, desc="scaling", disable=None) as bar:
        for sweep, n, d in cases:
            taps = spread_channels(source(n), d)
            for method, run in _methods(taps, sizes).items():
                bar.set_postfix_str(f"n {n}, d {d}, {method}")
                row: dict[str, Any] = {"sweep": sweep, "method": method, "n": n, "d": d}
                rows.append(row | ({"skipped": run} if isinstance(run, str) else _timed(taps.k, run)))
                bar.update()
    return rows


def spread_channels(taps: Taps, channels: int) -> Taps:
    """Evenly spaced channels, or, where there are too few, random mixtures of all of them.

    A TNO layer's channels are mixtures too: the rank of the taps stays what it is. The decay is
    kept if all channels share it.
    """
    k, decay = taps
    if channels <= len(k):
        chosen = torch.linspace(0, len(k) - 1, channels).round().long()
        return Taps(k[chosen], None if decay is None else decay[chosen])
    mixing = torch.randn(channels, len(k), generator=torch.Generator().manual_seed(0)) / len(k) ** 0.5
    same = decay is not None and bool((decay == decay[0]).all())
    return Taps(mixing @ k, decay[:1].expand(channels) if decay is not None and same else None)


Method = Callable[[], tuple[SSMParams, float | None]]


def _methods(taps: Taps, sizes: Sizes) -> dict[str, Method | str]:
    """Name -> what makes the recurrence and its condition number, or why it is left out."""
    k, decay = taps
    order = min(sizes.order, k.shape[1])
    methods: dict[str, Method | str] = {
        "etsc": lambda: (etsc(k, decay), None),
        "balanced": lambda: (balanced(k, order=order), None),
        "window": lambda: (window(k), None),
        "gradient": lambda: (gradient(k, order=order, steps=sizes.gradient_steps), None),
        "without balancing": lambda: (without_balancing(k), None),
        "vandermonde, real": lambda: vandermonde(k.double(), "real"),
        "vandermonde, random": lambda: vandermonde(k.double(), "random"),
    }
    if k.numel() > sizes.gradient_elements:
        methods["gradient"] = f"n d above {sizes.gradient_elements:,}"
    if k.shape[1] > sizes.vandermonde_length:
        reason = f"n above {sizes.vandermonde_length}"
        methods |= {"vandermonde, real": reason, "vandermonde, random": reason}
    return methods


def _timed(k: Tensor, run: Method) -> dict[str, Any]:
    """Error of the recurrence stored in the dtype of k, and the median of up to five times.

    Of several the first is left out: it finds cold caches.
    """
    times: list[float] = []
    while len(times) < 5 and (len(times) < 1 or sum(times) < 0.5):
        started = time.perf_counter()
        params, condition = run()
        times.append(time.perf_counter() - started)
    error = relative_error(k, params.to_dtype(k.dtype))
    row: dict[str, Any] = {"seconds": statistics.median(times[1:] or times), "error": error}
    return row if condition is None else row | {"condition": condition}
