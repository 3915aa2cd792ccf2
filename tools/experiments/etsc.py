"""The tables of ETSC's paper (arXiv 2311.08756): perplexity, error and time of conversion, token cost.

The token cost is a section of its own, in :mod:`experiments.token_cost`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.ablations import vandermonde, without_balancing
from experiments.frame import Claim, Declarations, Experiment, Files, Record, Section, select
from experiments.report import Column, Panel, Table, line, smallest_shown
from experiments.scoring import score, spread
from experiments.sizing import text_models
from experiments.token_cost import TOKEN_COST, duration
from experiments.training import train_family
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import balanced, convert_model, etsc, gradient, window
from tnnlm.conversion.methods import relative_error
from tnnlm.errors import UserError
from tnnlm.evaluation import ppl_gap
from tnnlm.kernels import TNOConfig, TNOKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.ops.ssm import SSMParams

EXACT = 1e-5
"""relative error of taps, stored in float32, up to which a conversion is exact to rounding"""
PARITY = 1e-4
"""relative difference of perplexities"""
TEXTS = Declarations("etsc")
NAMES = {"tnn": "TNN", "sgconv": "SGConv"}
METHODS = (
    *("etsc", "balanced", "window", "gradient", "without balancing"),
    *("vandermonde, real", "vandermonde, random"),
)
GRADIENT_TAPS = 1 << 17
"""largest n d that gradient descent is run on"""
VANDERMONDE_LENGTH = 512
"""largest n whose Vandermonde system is solved"""
_CHANNELS = 64
_SWEEPS = {"length": ("n", "d", "taps"), "width": ("d", "n", "channels")}
"""sweep -> what it varies, what it doesn't, and the first in words"""


def _perplexity_grid(size: str) -> list[Record]:
    shared = {"part": "perplexity", "seed": 0, "steps": TEXTS.sizes(size)["steps"], "size": size}
    return [shared | {"family": family} for family in NAMES]


def _perplexity(cell: Record, data: Files) -> Record:
    """Of a trained model before and after conversion, by context."""
    models = text_models(tuple(NAMES), cell["size"], cell["steps"], data)
    family = models.families[cell["family"]]
    model, _ = train_family(family, models.rows, cell["seed"])
    assert isinstance(model, CausalLM)
    model.eval()
    sizes, contexts = TEXTS.sizes(cell["size"]), {}
    for length in (multiple * family.config.model.max_length for multiple in sizes["multiples"]):
        available = models.corpus.rows("val", length)
        if not len(available):
            continue
        rows = spread(available, sizes["tokens"])
        parallel = score(model, rows, None)
        found: Record = {"tokens": parallel.tokens, "parallel": parallel.ppl, "gap": {}}
        for name, horizon in (("etsc", length), ("auto", "auto")):
            try:
                converted = convert_model(model, ConversionConfig(method=name, horizon=horizon))
            except UserError as error:
                found[name], found["gap"][name] = str(error), None
                continue
            ppl = score(converted, rows, family.config.conversion.chunk).ppl
            found[name], found["gap"][name] = ppl, ppl_gap(parallel.ppl, ppl)
        contexts[str(length)] = found
    return {"contexts": contexts, "params": family.params}


def _perplexity_claims(records: list[Record]) -> list[Claim]:
    found = []
    for family, label in NAMES.items():
        own = [record["contexts"] for record in select(records, part="perplexity", family=family)]
        gaps = [abs(context["gap"]["etsc"]) for contexts in own for context in contexts.values()]
        lengths = [int(length) for contexts in own for length in contexts]
        shown = {"gap": max(gaps), "shortest": min(lengths), "longest": max(lengths)}
        found.append(TEXTS.claim("equal", max(gaps) <= PARITY, family=label, **shown))
    return found


def _perplexity_tables(records: list[Record]) -> list[Table]:
    own = select(records, part="perplexity")
    forms = {"parallel": "parallel", "etsc": "ETSC, n = length", "auto": "auto"}

    def shown(length: str, row: tuple[Record, str]) -> str:
        value = row[0]["contexts"][length][row[1]]
        return f"{value:.4f}" if isinstance(value, float) else "refused"

    columns: dict[str, Column] = {
        "model": lambda row: NAMES[row[0]["family"]],
        "form": lambda row: forms[row[1]],
        **{f"{int(length):,}": partial(shown, length) for length in own[0]["contexts"]},
    }
    rows = [(record, form) for record in own for form in forms]
    return [Table("## Perplexity before and after conversion", columns, rows, after=TEXTS.text("perplexity"))]


def _conversion_grid(size: str) -> list[Record]:
    own = TEXTS.sizes(size)
    sizes = [("length", n, _CHANNELS) for n in own["lengths"]]
    sizes += [("width", own["width_length"], d) for d in own["widths"]]
    return [{"part": "conversion", "sweep": sweep, "n": n, "d": d, "size": size} for sweep, n, d in sizes]


def _conversion(cell: Record, data: Files) -> Record:
    """Error and time of every method, on the taps of an untrained TNO layer."""
    torch.manual_seed(0)
    kernel = TNOKernel(TNOConfig(), cell["d"])
    with torch.no_grad():
        k = kernel(cell["n"])
    return {"methods": convert_by_all(k, kernel.decay, tiny=cell["size"] == "tiny")}


def convert_by_all(k: Tensor, decay: Tensor | None, tiny: bool = False) -> dict[str, Record]:
    """Seconds and relative error of every one of ``METHODS``, as stored in the dtype of the taps.

    Args:
        k: taps (E, T).
        decay: of each channel, (E,).
        tiny: 8 state numbers and 20 steps of gradient descent, in the place of 32 and 1,000.

    Returns:
        by method ``seconds``, ``error``, and ``condition`` of a Vandermonde system; or ``skipped``: why.
    """
    order, steps = (8, 20) if tiny else (32, 1000)
    order = min(order, k.shape[1])
    made: dict[str, Callable[[], Any]] = {
        "etsc": lambda: etsc(k, decay),
        "balanced": lambda: balanced(k, order=order),
        "window": lambda: window(k),
        "gradient": lambda: gradient(k, order=order, steps=steps),
        "without balancing": lambda: without_balancing(k),
        "vandermonde, real": lambda: vandermonde(k.double(), "real"),
        "vandermonde, random": lambda: vandermonde(k.double(), "random"),
    }
    limits = {"gradient": ("n d", k.numel(), GRADIENT_TAPS)}
    limits |= dict.fromkeys(METHODS[-2:], ("n", k.shape[1], VANDERMONDE_LENGTH))
    found = {}
    for name in METHODS:
        what, value, limit = limits.get(name, ("", 0, 1))
        found[name] = {"skipped": f"{what} above {limit:,}"} if value > limit else _timed(k, made[name])
    return found


def _timed(k: Tensor, run: Callable[[], Any]) -> Record:
    """The median of up to five times. Of several the first is left out: it finds cold caches."""
    times: list[float] = []
    while len(times) < 5 and (len(times) < 1 or sum(times) < 0.5):
        started = time.perf_counter()
        params = run()
        times.append(time.perf_counter() - started)
    own, extra = (params, {}) if isinstance(params, SSMParams) else (params[0], {"condition": params[1]})
    error = relative_error(k, own.to_dtype(k.dtype))
    return {"seconds": statistics.median(times[1:] or times), "error": error, **extra}


def _conversion_claims(records: list[Record]) -> list[Claim]:
    converted = select(records, part="conversion")
    errors = [record["methods"]["etsc"]["error"] for record in converted]
    beside = [record["methods"] for record in converted if "seconds" in record["methods"]["gradient"]]
    faster, closer = (
        [methods["gradient"][key] / methods["etsc"][key] for methods in beside]
        for key in ("seconds", "error")
    )
    sizes = ", ".join(
        f"{key} {min(values):,} .. {max(values):,}"
        for key in ("n", "d")
        for values in [[int(record[key]) for record in converted]]
    )
    times = {"least": min(faster), "most": max(faster), "closer": min(closer)}
    return [
        TEXTS.claim("exact", max(errors) <= EXACT, error=max(errors), sizes=sizes),
        TEXTS.claim("fast", min(faster) >= 10 and min(closer) > 1, **times),
    ]


def _conversion_tables(records: list[Record]) -> list[Table]:
    def made(method: str, record: Record) -> str:
        cell = record["methods"][method]
        return f"{cell['error']:.1e}, {duration(cell['seconds'])}" if "error" in cell else "-"

    found = []
    for sweep, (key, fixed, what) in _SWEEPS.items():
        own = select(records, part="conversion", sweep=sweep)
        columns: dict[str, Column] = {key: lambda record, key=key: f"{record[key]:,}"}  # type: ignore[misc]
        columns |= {method: partial(made, method) for method in METHODS}
        note = TEXTS.text("conversion", fixed=fixed, value=own[0][fixed])
        found.append(Table(f"## Conversion against the number of {what}", columns, own, after=note))
    return found


def _conversion_panels(records: list[Record]) -> list[Panel]:
    panels: list[Panel] = []
    for sweep, (size, _, what) in _SWEEPS.items():
        own = select(records, part="conversion", sweep=sweep)
        for key, label in (("error", "relative error"), ("seconds", "seconds")):
            lines = []
            for method in METHODS:
                cells = [(record[size], record["methods"][method]) for record in own]
                points = [(x, smallest_shown(cell[key])) for x, cell in cells if key in cell]
                lines += [line(method, points)] if points else []
            axes = {"xlabel": what, "xscale": "log", "yscale": "log"}
            panels.append(Panel(f"conversion: {label}", lines, axes=axes, legend=not panels))
    return panels


ETSC = Experiment(
    name="etsc",
    title="Exact Toeplitz-to-SSM conversion",
    sections=(
        Section(
            grid=_perplexity_grid, measure=_perplexity, claims=_perplexity_claims, tables=_perplexity_tables
        ),
        Section(
            grid=_conversion_grid,
            measure=_conversion,
            claims=_conversion_claims,
            tables=_conversion_tables,
            panels=_conversion_panels,
        ),
        TOKEN_COST,
    ),
    columns=4,
    panel_size=(4, 3.5),
)
