"""Time and memory of decoding a token: recomputed, from cached inputs, by ETSC and by balanced reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.frame import Claim, Declarations, Files, Record, Section, select
from experiments.report import Panel, Table, line
from experiments.timing import clock_mean, interleaved, medians, peak_allocated
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import convert_model
from tnnlm.models.causal_lm import CausalLM, ModelState, state_bytes
from tnnlm.ops.recurrence import named_tensors, with_tensors

FORMS = ("recompute", "cached history", "etsc, n = length", "etsc, n = horizon", "balanced")
VOCABULARY = 256
"""Small, so that the mixers dominate the time."""
_ROUNDS = 7
_SWEEPS = ("length", "width", "depth")
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
    """Measure a decoding step with every method of ``FORMS``, interleaved, at the context of the cell.

    Returns:
        By method, ``seconds`` (median), ``kept``: bytes of the state (of the tokens for ``recompute``), and
        ``bytes``: ``kept`` and the peak allocation of the step.
    """
    torch.manual_seed(0)
    length = cell["length"]
    shape = ModelConfig(
        d_model=cell["width"], n_layers=cell["depth"], vocab_size=VOCABULARY, max_length=length
    )
    model = CausalLM(shape).eval()
    made = {
        "recompute": model,
        # A window of all inputs: every step multiplies each of them by its tap.
        "cached history": convert_model(model, method="window", horizon=length),
        "etsc, n = length": convert_model(model, method="etsc", horizon=length),
        "etsc, n = horizon": convert_model(model, method="etsc"),
        "balanced": convert_model(model, method="balanced"),
    }
    tokens = torch.randint(VOCABULARY, (1, length))
    steps = {name: _stepper(name, one, tokens) for name, one in made.items()}
    kept = {
        name: tokens.nbytes if name == "recompute" else state_bytes(one.init_state(1))
        for name, one in made.items()
    }
    return {
        "seconds": medians(interleaved(steps, _ROUNDS, clock=clock_mean)),
        "bytes": {name: kept[name] + peak_allocated(step) for name, step in steps.items()},
        "kept": kept,
    }


def _stepper(name: str, model: CausalLM, tokens: Tensor) -> Callable[[], Any]:
    if name == "recompute":
        return lambda: model(tokens)
    # The time does not depend on the state; noise avoids denormal numbers.
    layers = model.init_state(1).layers
    state = ModelState(
        tuple(with_tensors(layer, map(torch.randn_like, named_tensors(layer).values())) for layer in layers)
    )
    return lambda: model.step(tokens[:, -1], state)


def _claims(records: list[Record]) -> Iterator[Claim]:
    own = select(records, part="cost")
    by_length = select(own, sweep="length")
    shortest, longest = (pick(by_length, key=lambda record: record["length"]) for pick in (min, max))
    lengths = {"shortest": shortest["length"], "longest": longest["length"]}
    for form, label in TEXTS.named("flat_forms").items():
        first, last = (1e3 * record["seconds"][form] for record in (shortest, longest))
        same = longest["bytes"][form] <= 1.01 * shortest["bytes"][form]
        shown = {"first": first, "last": last, "growth": last / first}
        trend = "constant" if same else "grows"
        yield TEXTS.claim("flat", same, which=label, memory=trend, **shown, **lengths)
    for form in ("recompute", "cached history"):
        ratio = longest["seconds"][form] / longest["seconds"]["etsc, n = horizon"]
        yield TEXTS.claim("cheaper", form=form, longest=longest["length"], ratio=ratio)
    speed, memory = (
        [record[key]["etsc, n = length"] / record[key]["balanced"] for record in own]
        for key in ("seconds", "kept")
    )
    shown = {"slow": min(speed), "fast": max(speed), "large": min(memory), "small": max(memory)}
    yield TEXTS.claim("reduced", median=median(speed), **shown)


def duration(value: float) -> str:
    """Format a time in seconds or milliseconds."""
    return f"{value:.2g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _tables(records: list[Record]) -> Iterator[Table]:
    for sweep in _SWEEPS:
        own = select(records, part="cost", sweep=sweep)
        items = [
            {sweep: f"{record[sweep]:,}"}
            | {
                form: f"{duration(record['seconds'][form])}, {record['bytes'][form] / 1e6:.3g} MB"
                for form in FORMS
            }
            for record in own
        ]
        fixed = ", ".join(f"{name} {own[0][name]:,}" for name in _SWEEPS if name != sweep)
        about = f" {TEXTS.text('cost')}" if sweep == _SWEEPS[-1] else ""
        yield TEXTS.table("cost", items, sweep=sweep, fixed=fixed, about=about)


def _panels(records: list[Record]) -> Iterator[Panel]:
    for number, (key, sweep, below) in enumerate(TEXTS.named("cost")["panels"]):
        own = select(records, part="cost", sweep=sweep)
        lines = [line(form, [(record[sweep], record[key][form]) for record in own]) for form in FORMS]
        yield TEXTS.panel(key, lines, {"below": below}, legend=not number)


TOKEN_COST = Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels)
