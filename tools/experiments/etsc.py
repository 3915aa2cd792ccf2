"""Tables of the ETSC paper (arXiv 2311.08756): perplexity, error and time of the conversion, cost per token.

The cost per token is in :mod:`experiments.token_cost`. ``without_balancing`` and ``vandermonde`` are the
ablations of section 4.4, for comparison only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.frame import Claim, Declarations, Experiment, Files, Record, Section, select
from experiments.report import Panel, Table, line, smallest_shown
from experiments.sizing import text_models
from experiments.token_cost import TOKEN_COST, duration
from experiments.training import score, spread, train_family
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import balanced, convert_model, etsc, gradient, window
from tnnlm.conversion.etsc import roots_of_unity
from tnnlm.conversion.source import relative_error
from tnnlm.errors import UserError
from tnnlm.evaluation import ppl_gap
from tnnlm.kernels import TNOConfig, TNOKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.ops.ssm import SSMParams

TEXTS = Declarations("etsc")
NAMES = {"tnn": "TNN", "sgconv": "SGConv"}
GRADIENT_TAPS = 1 << 17
"""Largest number of taps, n times d, for gradient descent."""
VANDERMONDE_LENGTH = 512
"""Largest number of taps n for Vandermonde systems."""
_CHANNELS = 64
_SWEEPS = {"length": ("n", "d", "taps"), "width": ("d", "n", "channels")}
"""Varied size, fixed size and name of the varied size, by sweep."""


def _perplexity_grid(size: str) -> list[Record]:
    shared = {"part": "perplexity", "seed": 0, "steps": TEXTS.sizes(size)["steps"], "size": size}
    return [shared | {"family": family} for family in NAMES]


def _perplexity(cell: Record, data: Files) -> Record:
    """Measure the perplexity of a trained model before and after conversion, by context length."""
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


def _perplexity_claims(records: list[Record]) -> Iterator[Claim]:
    for record in select(records, part="perplexity"):
        contexts = record["contexts"]
        gap = max(abs(context["gap"]["etsc"]) for context in contexts.values())
        lengths = sorted(map(int, contexts))
        shown = {"shortest": lengths[0], "longest": lengths[-1]}
        yield TEXTS.claim("equal", family=NAMES[record["family"]], gap=gap, **shown)


def _perplexity_tables(records: list[Record]) -> Iterator[Table]:
    items = []
    for record in select(records, part="perplexity"):
        for method, label in (("parallel", "parallel"), ("etsc", "ETSC, n = length"), ("auto", "auto")):
            found = {f"{int(n):,}": context[method] for n, context in record["contexts"].items()}
            ppl = {n: "refused" if isinstance(value, str) else f"{value:.4f}" for n, value in found.items()}
            items.append({"model": NAMES[record["family"]], "evaluation": label} | ppl)
    yield TEXTS.table("perplexity", items)


def _conversion_grid(size: str) -> list[Record]:
    own = TEXTS.sizes(size)
    sizes = [("length", n, _CHANNELS) for n in own["lengths"]]
    sizes += [("width", own["width_length"], d) for d in own["widths"]]
    return [{"part": "conversion", "sweep": sweep, "n": n, "d": d, "size": size} for sweep, n, d in sizes]


def _conversion(cell: Record, data: Files) -> Record:
    """Measure error and time of every method on the taps of an untrained TNO layer."""
    torch.manual_seed(0)
    kernel = TNOKernel(TNOConfig(), cell["d"])
    with torch.no_grad():
        k = kernel(cell["n"])
    return {"methods": convert_by_all(k, kernel.decay, tiny=cell["size"] == "tiny")}


def convert_by_all(k: Tensor, decay: Tensor | None, tiny: bool = False) -> dict[str, Record]:
    """Measure seconds and relative error of every conversion method, stored in the dtype of the taps.

    Args:
        k: Taps (E, T).
        decay: Decay of each channel, (E,).
        tiny: Use 8 state numbers and 20 steps of gradient descent instead of 32 and 1,000.

    Returns:
        By method, ``seconds``, ``error`` and the ``condition`` number of a Vandermonde system, or the reason
        why it was ``skipped``.
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
    solved = ("n", k.shape[1], VANDERMONDE_LENGTH)
    limits = {"vandermonde, real": solved, "vandermonde, random": solved}
    limits["gradient"] = ("n d", k.numel(), GRADIENT_TAPS)
    found = {}
    for name, run in made.items():
        what, value, limit = limits.get(name, ("", 0, 1))
        found[name] = {"skipped": f"{what} above {limit:,}"} if value > limit else _timed(k, run)
    return found


def _timed(k: Tensor, run: Callable[[], Any]) -> Record:
    """Measure error and median time of up to five runs; the first of several is a warm-up."""
    times: list[float] = []
    while len(times) < 5 and (len(times) < 1 or sum(times) < 0.5):
        started = time.perf_counter()
        params = run()
        times.append(time.perf_counter() - started)
    own, extra = (params, {}) if isinstance(params, SSMParams) else (params[0], {"condition": params[1]})
    error = relative_error(k, own.to_dtype(k.dtype))
    return {"seconds": statistics.median(times[1:] or times), "error": error, **extra}


def without_balancing(k: Tensor) -> SSMParams:
    """Convert taps by ETSC without the balancing tap: an n-point DFT that keeps the constant mode.

    It is exact at lags below n as well, but the constant mode is a pole at 1: past n the kernel repeats
    with its mean, and rounding errors accumulate.

    Args:
        k: Taps (E, n) in float64.
    """
    n = k.shape[1]
    spectrum = torch.fft.rfft(k.double()) / n
    poles = roots_of_unity(n, k.device)
    weight = torch.full_like(poles[0], 2.0)
    # The constant mode and, for even n, the mode at -1 have no conjugate.
    weight[0] = 1.0
    if n % 2 == 0:
        weight[-1] = 1.0
    residues = torch.stack((spectrum.real * weight, spectrum.imag * weight), dim=1)
    return SSMParams(residues.new_zeros(len(k), 0), poles, residues)


def vandermonde(k: Tensor, eigenvalues: str) -> tuple[SSMParams, float]:
    """Compute the residues for n given eigenvalues by solving the Vandermonde system of n taps.

    Args:
        k: Taps (E, n) in float64.
        eigenvalues: ``real``, evenly spaced on (-1, 1), or ``random``, uniform in the unit disc.

    Returns:
        Parameters in float64 and the condition number of the system; beyond 1e16 the solution is useless.
    """
    n = k.shape[1]
    if eigenvalues == "real":
        poles = torch.linspace(-1, 1, n + 2, dtype=torch.float64)[1:-1].to(torch.complex128)
    else:
        generator = torch.Generator().manual_seed(0)
        radius = torch.rand(n, dtype=torch.float64, generator=generator).sqrt()
        poles = torch.polar(radius, 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator))
    poles = poles.to(k.device)
    matrix = poles[None, :] ** torch.arange(n, device=k.device)[:, None]
    condition = float(torch.linalg.cond(matrix))
    # Least squares, because an exact solver overflows if the system is numerically singular.
    residues = torch.linalg.lstsq(matrix, k.T.to(torch.complex128), driver="gelsd").solution.T
    planes = torch.view_as_real(residues).transpose(1, 2).contiguous()
    return SSMParams(planes.new_zeros(len(k), 0), torch.view_as_real(poles).T.contiguous(), planes), condition


def _conversion_claims(records: list[Record]) -> Iterator[Claim]:
    converted = select(records, part="conversion")
    spans = {key: [pick(record[key] for record in converted) for pick in (min, max)] for key in ("n", "d")}
    error = max(record["methods"]["etsc"]["error"] for record in converted)
    yield TEXTS.claim("exact", error=error, **spans)
    compared = [record["methods"] for record in converted if "seconds" in record["methods"]["gradient"]]
    faster, closer = (
        [methods["gradient"][key] / methods["etsc"][key] for methods in compared]
        for key in ("seconds", "error")
    )
    times = {"least": min(faster), "most": max(faster), "closer": min(closer)}
    yield TEXTS.claim("fast", **times)


def _conversion_tables(records: list[Record]) -> Iterator[Table]:
    def shown(cell: Record) -> str:
        return f"{cell['error']:.1e}, {duration(cell['seconds'])}" if "error" in cell else "-"

    for sweep, (key, fixed, what) in _SWEEPS.items():
        own = select(records, part="conversion", sweep=sweep)
        items = [
            {key: f"{record[key]:,}"} | {name: shown(cell) for name, cell in record["methods"].items()}
            for record in own
        ]
        yield TEXTS.table("conversion", items, what=what, fixed=fixed, value=own[0][fixed])


def _conversion_panels(records: list[Record]) -> Iterator[Panel]:
    for sweep, (size, _, what) in _SWEEPS.items():
        own = select(records, part="conversion", sweep=sweep)
        for key in ("error", "seconds"):
            lines = []
            for name in own[0]["methods"]:
                made = [(record[size], record["methods"][name]) for record in own]
                lines.append(line(name, [(x, smallest_shown(cell[key])) for x, cell in made if key in cell]))
            first = (sweep, key) == ("length", "error")
            yield TEXTS.panel(f"conversion_{key}", lines, {"what": what}, legend=first)


_PERPLEXITY = Section(
    grid=_perplexity_grid, measure=_perplexity, claims=_perplexity_claims, tables=_perplexity_tables
)
_CONVERSION = Section(
    grid=_conversion_grid,
    measure=_conversion,
    claims=_conversion_claims,
    tables=_conversion_tables,
    panels=_conversion_panels,
)
ETSC = Experiment(sections=(_PERPLEXITY, _CONVERSION, TOKEN_COST), **TEXTS.named("experiment"))
