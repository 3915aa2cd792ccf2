"""Every conversion side by side: cost and error against size, perplexity against context, error against order.

The first is the protocol of the ETSC paper (arXiv 2311.08756, section 4); the last holds balanced
reduction against the limit of Adamyan, Arov and Krein. Errors are of the stored numbers, measured.
Results are plain data; :mod:`tnnlm.comparison_plots` turns them into tables and pictures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tnnlm.conversion import balanced, convert_model, etsc, gradient, model_horizon, window
from tnnlm.conversion.ablations import vandermonde, without_balancing
from tnnlm.conversion.convert import kernels, recurrences
from tnnlm.conversion.hankel import compress, hankel_norm, hankel_svd
from tnnlm.conversion.horizon import ROUNDING
from tnnlm.conversion.methods import relative_error
from tnnlm.errors import UserError
from tnnlm.evaluation import NLL, add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.model import CausalLM
from tnnlm.ops import ssm
from tnnlm.ops.ssm import SSMParams
from tnnlm.packing import PackedRows

RANK = 128
"""combinations of channels whose Hankel norm is taken"""
EXTENT = 2
"""errors are looked for up to so many horizons"""
RATIO_ORDERS = range(4, 33)
"""orders whose ratio to the bound is summarised"""
_PASS_TOKENS = 1 << 13
"""tokens in one pass of the model"""


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
    gradient_steps: int = 300
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
"""sizes of about a minute"""


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
    """Error of the recurrence stored in the dtype of k, and the median of up to five times."""
    times: list[float] = []
    while len(times) < 5 and (len(times) < 1 or sum(times) < 0.5):
        started = time.perf_counter()
        params, condition = run()
        times.append(time.perf_counter() - started)
    error = relative_error(k, ssm.to_dtype(params, k.dtype))
    row: dict[str, Any] = {"seconds": statistics.median(times), "error": error}
    return row if condition is None else row | {"condition": condition}


def perplexity(model: CausalLM, held_out: Callable[[int], PackedRows], sizes: Sizes) -> dict[str, Any]:
    """Perplexity of the parallel form and of every conversion, by context.

    Args:
        model: in its parallel form.
        held_out: the rows of a length of held-out text.
        sizes: contexts, tokens and orders.

    Returns:
        ``contexts``: length -> tokens scored; ``horizon``; ``forms``: rows with ``form``,
        ``state_bytes``, relative tap errors of the worst layer below the training length
        (``error``) and on ``EXTENT`` horizons (``error_past``), and ``ppl``: length -> perplexity;
        ``skipped``: why a form or a context is missing.

    Raises:
        UserError: if the text doesn't fill one row of the training length.
    """
    trained, horizon = model.config.max_length, model_horizon(model)
    skipped: list[str] = []
    forms = dict(_forms(model, trained, horizon, sizes, skipped))
    rows = [_describe(name, model, form, trained, horizon) for name, form in forms.items()]
    contexts: dict[int, int] = {}
    for length in (multiple * trained for multiple in sizes.multiples):
        available = held_out(length)
        if not len(available):
            skipped.append(f"{length} tokens: the held-out text is shorter")
            continue
        chosen = torch.linspace(0, len(available) - 1, min(len(available), max(1, sizes.tokens // length)))
        tokens = torch.stack([available[int(index)] for index in chosen.round().long()])
        contexts[length] = len(tokens) * length
        for row in tqdm(rows, desc=f"perplexity at {length}", leave=False, disable=None):
            row["ppl"][length] = _score(model, forms[row["form"]], tokens).ppl
    if not contexts:
        raise UserError(f"the held-out text doesn't fill one row of {trained} tokens: give more of it")
    return {
        "contexts": contexts,
        "trained": trained,
        "horizon": horizon,
        "forms": rows,
        "skipped": skipped,
        "gap": {row["form"]: _gaps(rows[0]["ppl"], row["ppl"]) for row in rows[1:]},
    }


def _gaps(parallel: dict[int, float], recurrent: dict[int, float]) -> dict[int, float]:
    return {length: ppl_gap(parallel[length], value) for length, value in recurrent.items()}


def _forms(
    model: CausalLM, trained: int, horizon: int, sizes: Sizes, skipped: list[str]
) -> Iterator[tuple[str, CausalLM | None]]:
    """Names and converted models; None is the parallel form itself."""
    yield "parallel", None
    yield f"etsc, n = {trained}", convert_model(model, method="etsc", horizon=trained)
    yield f"etsc, n = {horizon}", convert_model(model, method="etsc", horizon=horizon)
    yield f"window of {trained}", convert_model(model, method="window", horizon=trained)
    for order in sizes.ppl_orders:
        name = f"balanced, order {order}"
        try:
            yield name, convert_model(model, method="balanced", horizon=horizon, order=order)
        except UserError as error:
            skipped.append(f"{name}: {error}")


def _describe(
    name: str, model: CausalLM, form: CausalLM | None, trained: int, horizon: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"form": name, "state_bytes": None, "error": None, "error_past": None, "ppl": {}}
    if form is None:
        return row
    layers = recurrences(form)
    row["state_bytes"] = sum(ssm.state_bytes(params) for params in layers)
    with torch.no_grad():
        taps = [kernel(max(trained, EXTENT * horizon)) for kernel in kernels(model)]
    for key, lags in (("error", trained), ("error_past", None)):
        errors = [relative_error(k[:, :lags], params) for k, params in zip(taps, layers, strict=True)]
        row[key] = max(errors)
    return row


def _score(model: CausalLM, form: CausalLM | None, tokens: Tensor) -> NLL:
    """Score rows (B, L + 1), some at a time."""
    length = tokens.shape[1] - 1
    parts = []
    for rows in tokens.split(max(1, _PASS_TOKENS // length)):
        chunk = min(length, model.config.max_length)
        parts.append(parallel_nll(model, rows) if form is None else recurrent_nll(form, rows, chunk))
    return add(parts)


def orders(model: CausalLM, sizes: Sizes) -> dict[str, Any]:
    """Errors of balanced reduction against the order, beside what no recurrence of that order can beat.

    Returns:
        ``horizon``; ``rows`` by ``layer`` and ``order``: ``bound`` (sigma_{N+1} / sigma_1), ``hankel``
        (Hankel norm of k - k^ over sigma_1), ``ratio`` of the two (None where the bound is float32
        rounding), relative tap ``error``; ``median_ratio``, ``max_ratio`` over ``RATIO_ORDERS``.
    """
    horizon = model_horizon(model)
    wanted = [order for order in sizes.orders if order <= horizon]
    chosen = kernels(model)[: sizes.layers]
    rows = []
    with tqdm(total=len(chosen) * len(wanted), desc="orders", disable=None) as bar:
        for layer, kernel in enumerate(chosen):
            with torch.no_grad():
                k = kernel(EXTENT * horizon).float()
            # Of the same finite matrix as the errors' norm: the bound holds for that one.
            sigma = hankel_svd(compress(k, RANK).unsqueeze(0), max(wanted) + 1)[0][0]
            for order in wanted:
                params = ssm.to_dtype(balanced(k[:, :horizon], order=order), k.dtype)
                rows.append({"layer": layer, "order": order, **_against_bound(k, params, sigma, order)})
                bar.update()
    ratios = [row["ratio"] for row in rows if row["order"] in RATIO_ORDERS and row["ratio"] is not None]
    return {
        "horizon": horizon,
        "rows": rows,
        "median_ratio": statistics.median(ratios) if ratios else None,
        "max_ratio": max(ratios, default=None),
    }


def _against_bound(k: Tensor, params: SSMParams, sigma: Tensor, order: int) -> dict[str, float | None]:
    bound = float(sigma[order]) if order < len(sigma) else 0.0
    norm = hankel_norm(compress((k - ssm.taps(params, k.shape[1])), RANK))
    largest = float(sigma[0].clamp(min=torch.finfo(torch.float64).tiny))
    return {
        "bound": bound / largest,
        "hankel": norm / largest,
        "ratio": norm / bound if bound > 10 * ROUNDING * largest else None,
        "error": relative_error(k, params),
    }
