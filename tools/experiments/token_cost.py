"""Seconds and bytes of one more token: recomputed, from the cached history, by ETSC, and by our own form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.frame import Claim, Declarations, Files, Record, Section, select
from experiments.report import Column, Panel, Table, line
from experiments.timing import clock_mean, interleaved, medians, peak_allocated
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import convert_model
from tnnlm.models.causal_lm import CausalLM, ModelState, state_bytes

FORMS = ("recompute", "cached history", "etsc, n = length", "etsc, n = horizon", "balanced")
GROWTH = 2.0
"""time of a token at the longest context over that at the shortest, up to which it counts as flat"""
VOCABULARY = 256
"""small, so that what is timed is the mixing"""
_ROUNDS = 7
TEXTS = Declarations("etsc")


def _grid(size: str) -> list[Record]:
    sizes = TEXTS.sizes(size)
    return [
        {"part": "cost", "sweep": sweep, **sizes["base"], sweep: value}
        for sweep, values in sizes["varied"].items()
        for value in values
    ]


@torch.inference_mode()
def _measure(cell: Record, data: Files) -> Record:
    """Of every form at a context of so many tokens, in turns.

    Returns:
        by form ``seconds`` (median) and ``bytes``: of the state that is kept, and of what the step
        allocates meanwhile at its peak; for ``recompute`` the tokens are the state.
    """
    torch.manual_seed(0)
    length = cell["length"]
    shape = ModelConfig(
        d_model=cell["width"], n_layers=cell["depth"], vocab_size=VOCABULARY, max_length=length
    )
    model = CausalLM(shape).eval()
    made = {
        "recompute": model,
        # A window of all inputs: every one of them is multiplied by its tap again.
        "cached history": convert_model(model, method="window", horizon=length),
        "etsc, n = length": convert_model(model, method="etsc", horizon=length),
        "etsc, n = horizon": convert_model(model, method="etsc"),
        "balanced": convert_model(model, method="balanced"),
    }
    tokens = torch.randint(VOCABULARY, (1, length))
    steps = {name: _stepper(name, form, tokens) for name, form in made.items()}
    kept = {
        name: tokens.nbytes if name == "recompute" else state_bytes(form.init_state(1))
        for name, form in made.items()
    }
    return {
        "seconds": medians(interleaved(steps, _ROUNDS, clock=clock_mean)),
        "bytes": {name: kept[name] + peak_allocated(step) for name, step in steps.items()},
        "kept": kept,
    }


def _stepper(name: str, model: CausalLM, tokens: Tensor) -> Callable[[], Any]:
    if name == "recompute":
        return lambda: model(tokens)
    # Any state costs the same; noise, so that no number is a denormal one.
    layers = (type(part)(*map(torch.randn_like, part)) for part in model.init_state(1).layers)
    state = ModelState(tuple(layers))
    return lambda: model.step(tokens[:, -1], state)


def _claims(records: list[Record]) -> list[Claim]:
    by_length = select(records, part="cost", sweep="length")
    shortest, longest = (pick(by_length, key=lambda record: record["length"]) for pick in (min, max))
    found = []
    for form, label in (
        ("etsc, n = horizon", "by ETSC, at the horizon at which the kernel has died out"),
        ("balanced", "by our reduced form"),
    ):
        first, last = shortest["seconds"][form], longest["seconds"][form]
        same = longest["bytes"][form] <= 1.01 * shortest["bytes"][form]
        shown = {"first": 1e3 * first, "last": 1e3 * last, "memory": "the same" if same else "grows"}
        lengths = {"shortest": shortest["length"], "longest": longest["length"]}
        found.append(TEXTS.claim("flat", last <= GROWTH * first and same, which=label, **shown, **lengths))
    for form in ("recompute", "cached history"):
        ratio = longest["seconds"][form] / longest["seconds"]["etsc, n = horizon"]
        found.append(TEXTS.claim("cheaper", ratio > 1, form=form, longest=longest["length"], ratio=ratio))
    speed, memory = (
        [record[key]["etsc, n = length"] / record[key]["balanced"] for record in select(records, part="cost")]
        for key in ("seconds", "kept")
    )
    shown = {"slow": min(speed), "fast": max(speed), "large": min(memory), "small": max(memory)}
    cheaper = min(speed) > 1 and min(memory) > 1
    return [*found, TEXTS.claim("reduced", cheaper, median=median(speed), **shown)]


def duration(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value:.2g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _tables(records: list[Record]) -> list[Table]:
    def varied(sweep: str, record: Record) -> str:
        return f"{record[sweep]:,}"

    def cost(form: str, record: Record) -> str:
        return f"{duration(record['seconds'][form])}, {record['bytes'][form] / 1e6:.3g} MB"

    found = []
    sweeps = ("length", "width", "depth")
    for sweep in sweeps:
        own = select(records, part="cost", sweep=sweep)
        columns: dict[str, Column] = {sweep: partial(varied, sweep)}
        columns |= {form: partial(cost, form) for form in FORMS}
        note = f"At {', '.join(f'{name} {own[0][name]:,}' for name in sweeps if name != sweep)}."
        if sweep == sweeps[-1]:
            note += " " + TEXTS.text("cost")
        found.append(Table(f"## Cost of a token against {sweep}", columns, own, after=note))
    return found


def _panels(records: list[Record]) -> list[Panel]:
    panels: list[Panel] = []
    for sweep, key, label in (
        ("length", "seconds", "seconds per token"),
        ("length", "bytes", "bytes"),
        ("width", "seconds", "seconds per token"),
        ("depth", "seconds", "seconds per token"),
    ):
        own = select(records, part="cost", sweep=sweep)
        lines = [line(form, [(record[sweep], record[key][form]) for record in own]) for form in FORMS]
        axes = {"xlabel": "context" if sweep == "length" else sweep, "xscale": "log", "yscale": "log"}
        panels.append(Panel(f"a token: {label}", lines, axes=axes, legend=not panels))
    return panels


TOKEN_COST = Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels)
