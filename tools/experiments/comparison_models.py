"""A trained model under every conversion: perplexity against context, error against order.

The second holds balanced reduction against the limit of Adamyan, Arov and Krein. Results are plain
data; :mod:`experiments.comparison_plots` turns them into tables and pictures.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.comparison import Sizes
from tnnlm.conversion import balanced, convert_model, model_horizon
from tnnlm.conversion.horizon import ROUNDING
from tnnlm.conversion.linalg import compress, hankel_norm, hankel_svd
from tnnlm.conversion.methods import relative_error
from tnnlm.data.packing import PackedRows
from tnnlm.errors import DataError, UserError
from tnnlm.evaluation import NLL, add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.ops import recurrence
from tnnlm.ops.ssm import SSMParams

RANK = 128
"""combinations of channels whose Hankel norm is taken"""
EXTENT = 2
"""errors are looked for up to so many horizons"""
RATIO_ORDERS = range(4, 33)
"""orders whose ratio to the bound is summarised"""
_PASS_TOKENS = 1 << 13
"""tokens in one pass of the model"""


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
        DataError: if the text doesn't fill one row of the training length.
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
        raise DataError(f"the held-out text doesn't fill one row of {trained} tokens: give more of it")
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
    row["state_bytes"] = sum(recurrence.state_bytes(params) for params in layers)
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
                params = balanced(k[:, :horizon], order=order).to_dtype(k.dtype)
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
    norm = hankel_norm(compress((k - params.taps(k.shape[1])), RANK))
    largest = float(sigma[0].clamp(min=torch.finfo(torch.float64).tiny))
    return {
        "bound": bound / largest,
        "hankel": norm / largest,
        "ratio": norm / bound if bound > 10 * ROUNDING * largest else None,
        "error": relative_error(k, params),
    }
