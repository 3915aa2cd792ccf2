"""Claims, tables and panels of the synthetic memory tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

from experiments.frame import Claim, Declarations, Record, Section, grouped, mean_of, select
from experiments.report import PALETTE, Line, Panel, Table, line

PERFECT = 0.999
"""Fraction of correct symbols that counts as perfect; 100 % as published."""
NAMES = {"rtf": "RTF", "tnn": "TNN", "sgconv": "SGConv"}
TASKS = ("copying", "delay")
_TRIED_AT = 128
"""Number of symbols at size small, for which other settings were tried."""
TEXTS = Declarations("synthetic")


def by_state(records: Iterable[Record], key: str, over_seeds: Any = statistics.mean) -> dict[int, float]:
    """Return a value of RTF by state size, reduced over the seeds, by default to the mean."""
    own = [record for record in select(records, family="rtf") if key in record]
    return {
        n: float(over_seeds(record[key] for record in found))
        for n, found in grouped(own, "state_size").items()
    }


def threshold(copies: list[Record]) -> int | None:
    """Return the smallest state size from which every seed copies perfectly, if there is one."""
    worst = by_state(copies, "score", min)
    missed = max((n for n, score in worst.items() if score < PERFECT), default=0)
    return min((n for n in worst if n > missed), default=None)


def _figure(task: str, value: float) -> str:
    """Format an accuracy in percent, or an error."""
    return f"{100 * value:.1f} %" if task == "copying" else f"{value:.4f}"


def _copying_claims(records: list[Record]) -> Iterator[Claim]:
    copies = select(records, task="copying")
    perfect, symbols = threshold(copies), copies[0]["lag"]
    scores = ", ".join(f"{n}: {_figure('copying', x)}" for n, x in by_state(copies, "score").items())
    found = f"from {perfect} for {symbols} symbols" if perfect else f"at no state size; {scores}"
    yield TEXTS.claim("perfect", perfect is not None, found=found)
    quarter = perfect is not None and 4 * perfect <= symbols
    yield TEXTS.claim("quarter", quarter, scores=scores, steps=copies[0]["steps"])


def _delay_claims(records: list[Record]) -> Iterator[Claim]:
    delays = select(records, task="delay")
    errors = dict(sorted(by_state(delays, "score").items()))
    state, order = max(errors), list(errors.values())
    shown = {"error": errors[state], "state": state, "lag": delays[0]["lag"]}
    yield TEXTS.claim("holds_delay", rounded=round(errors[state], 3), **shown)
    falls = all(after <= 1.02 * before for before, after in pairwise(order)) and order[-1] < order[0] / 2
    yield TEXTS.claim("falls", falls, errors="; ".join(f"{n}: {error:.3f}" for n, error in errors.items()))


def _cost_claims(records: list[Record]) -> Iterator[Claim]:
    (cost,) = select(records, task="cost")
    for what, key, scale, unit in (("time", "seconds", 1e3, "ms"), ("memory", "peak_bytes", 2**-20, "MiB")):
        first, *_, last = cost[key]
        low, high = (scale * pick(cost[key].values()) for pick in (min, max))
        shown = {"what": what, "low": low, "high": high, "unit": unit, "first": first, "last": last}
        yield TEXTS.claim("cost", ratio=high / low, **shown)


def _form_claims(records: list[Record]) -> Iterator[Claim]:
    """Compare the recurrences with the parallel forms, and the families with each other."""
    trained = [record for record in records if record["task"] != "cost"]
    made = [record for record in trained if "score_recurrent" in record]
    apart = {
        task: max((abs(r["score_recurrent"] - r["score"]) for r in select(made, task=task)), default=0.0)
        for task in TASKS
    }
    yield TEXTS.claim("forms", len(made) == len(trained), made=len(made), trained=len(trained), **apart)
    own = select(trained, family="rtf")
    companion = select(own, method="companion")
    yield TEXTS.claim("companion", len(companion) == len(own), companion=len(companion), own=len(own))
    for task in TASKS:
        rows = select(trained, task=task)
        best = by_state(rows, "score")
        ours = best[max(best)]
        others = {name: mean_of(select(rows, family=name), "score") for name in ("tnn", "sgconv")}
        shown = ", ".join(f"{NAMES[name]} {_figure(task, x)}" for name, x in others.items())
        ahead = all(ours >= x if task == "copying" else ours <= x for x in others.values())
        yield TEXTS.claim("ahead", ahead, task=task, ours=_figure(task, ours), others=shown)


def _marks(cell: Record) -> dict[str, float]:
    """Return the state size that each task needs: for copying the delay per layer if all layers delay alike,
    for delay the degrees of freedom of the signal, twice the cut-off frequency 0.25 times the delay."""
    return {"copying": cell["lag"] / cell.get("layers", 1), "delay": 2 * 0.25 * cell["lag"]}


def _rates(records: list[Record]) -> str:
    """Format the peak learning rate, and those of the kernels."""
    kernels = {NAMES[record["family"]]: record["lr"] * record["kernel_lr_scale"] for record in records}
    of_kernels = ", ".join(f"{x:g} ({name})" for name, x in kernels.items())
    return f"{records[0]['lr']:g}, for kernels {of_kernels}"


def _task_tables(task: str, records: list[Record]) -> Iterator[Table]:
    found = select(records, task=task)
    items = []
    for family, models in grouped(found, "family").items():
        for state, own in grouped(models, "state_size").items():
            made = [record for record in own if "score_recurrent" in record]
            methods, orders = (dict.fromkeys(str(r[key]) for r in made) for key in ("method", "order"))
            shown = {
                "family": NAMES[family],
                "state size": str(state or "-"),
                "parallel": _figure(task, mean_of(own, "score")),
                "recurrent": _figure(task, mean_of(made, "score_recurrent")) if made else "-",
                "chance": _figure(task, mean_of(own, "chance")),
                "conversion": ", ".join(methods) or "refused",
                "state numbers per channel": ", ".join(orders) or "-",
                "largest pole": f"{max(record['largest_pole'] for record in made):.4f}" if made else "-",
                "ms per training step": f"{1e3 * mean_of(own, 'seconds_per_step'):.1f}",
            }
            items.append(shown)
    values = found[0] | {"rates": _rates(found), "mark": _marks(found[0])[task]}
    if task == "copying":
        symbols = values["vocab_size"] - 2
        bits = values["lag"] * math.log2(symbols)  # information in the symbols of a row
        values |= {"symbols": symbols, "bits": bits, "numbers": bits / 32}
    yield TEXTS.table(task, items, **values)


def _cost_tables(records: list[Record]) -> Iterator[Table]:
    (cost,) = select(records, task="cost")
    items = [
        {"state": n, "ms": 1e3 * seconds, "mib": cost["peak_bytes"][n] / 2**20}
        for n, seconds in cost["seconds"].items()
    ]
    yield TEXTS.table("cost", items, **cost)


def _afterwards(records: list[Record]) -> Iterator[Table]:
    """List refused conversions, and what was tried."""
    refused = dict.fromkeys(record["refused"] for record in records if record.get("refused"))
    if refused:
        yield TEXTS.table("refused", told="\n".join(f"- `{text}`" for text in refused))
    if select(records, task="copying")[0]["lag"] == _TRIED_AT:
        yield TEXTS.table("tried")


def _task_panels(task: str, records: list[Record]) -> Iterator[Panel]:
    """Plot RTF by state size in both forms; the other families and chance are horizontal lines."""
    own = select(records, task=task)
    again = by_state(own, "score_recurrent").items()
    lines = [
        line("RTF, parallel", by_state(own, "score").items(), "rtf"),
        line("RTF, recurrent", again, "rtf", marker="x", linestyle=""),
    ]
    for name in ("tnn", "sgconv"):
        level = mean_of(select(own, family=name), "score")
        lines.append(Line(NAMES[name], y=[level], style={"color": PALETTE[name]}))
    lines.append(Line("chance", y=[mean_of(own, "chance")], style={"color": "grey", "linestyle": "--"}))
    style = {"color": "black", "linestyle": ":"}
    lines.append(Line(TEXTS.text(f"{task}_mark"), x=[_marks(own[0])[task]], style=style))
    yield TEXTS.panel(task, lines)


def _cost_panels(records: list[Record]) -> Iterator[Panel]:
    (cost,) = select(records, task="cost")
    lines = []
    for key, what in (("seconds", "time"), ("peak_bytes", "memory")):
        first = next(iter(cost[key].values()))
        lines.append(line(f"{what}, relative", [(int(n), value / first) for n, value in cost[key].items()]))
    yield TEXTS.panel("cost", lines)


SAYS = (
    *(
        Section(claims=claims, tables=partial(_task_tables, task), panels=partial(_task_panels, task))
        for task, claims in zip(TASKS, (_copying_claims, _delay_claims), strict=True)
    ),
    Section(claims=_cost_claims, tables=_cost_tables, panels=_cost_panels),
    Section(claims=_form_claims, tables=_afterwards),
)
