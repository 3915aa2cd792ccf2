"""What the synthetic memory tasks say: claims, tables, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

from experiments.frame import Claim, Declarations, Record, grouped, select
from experiments.report import PALETTE, Line, Panel, Table, line

PERFECT = 0.999
"""share of symbols from which a copy counts as perfect: 100 % as published"""
PUBLISHED_DELAY = 0.006
"""RMSE, told to three decimals"""
FLAT = 1.2
"""largest over smallest, of figures that are flat"""
NAMES = {"rtf": "RTF", "tnn": "TNN", "sgconv": "SGConv"}
EQUAL = {"copying": 2e-3, "delay": 2e-3}
"""largest difference of the two forms' scores"""
_LABELS = {"copying": "symbols told right", "delay": "RMSE of the delayed signal"}
_TRIED_AT = 128
"""symbols: the small size"""
TEXTS = Declarations("synthetic")


def by_state(records: Iterable[Record], key: str, over_seeds: Any = statistics.mean) -> dict[int, float]:
    """A figure of RTF by state size, the mean of the seeds unless told otherwise."""
    own = [record for record in select(records, family="rtf") if key in record]
    return {
        n: float(over_seeds(record[key] for record in found))
        for (n,), found in grouped(own, "state_size").items()
    }


def threshold(copies: list[Record]) -> int | None:
    """The state size from which on every seed copies perfectly, if there is one."""
    worst = by_state(copies, "score", min)
    enough = None
    for n in sorted(worst, reverse=True):
        if worst[n] < PERFECT:
            break
        enough = n
    return enough


def _mean(records: Iterable[Record], key: str) -> float:
    return statistics.mean(record[key] for record in records)


def _figure(task: str, value: float) -> str:
    """An accuracy in per cent, or an error."""
    return f"{100 * value:.1f} %" if task == "copying" else f"{value:.4f}"


def _copying_claims(records: list[Record]) -> list[Claim]:
    copies = select(records, task="copying")
    perfect, symbols = threshold(copies), copies[0]["lag"]
    scores = ", ".join(f"{n}: {_figure('copying', x)}" for n, x in by_state(copies, "score").items())
    found = f"from {perfect} on, of {symbols} symbols" if perfect else f"at none; {scores}"
    quarter = perfect is not None and 4 * perfect <= symbols
    return [
        TEXTS.claim("perfect", perfect is not None, found=found),
        TEXTS.claim("quarter", quarter, scores=scores, steps=copies[0]["steps"]),
    ]


def _delay_claims(records: list[Record]) -> list[Claim]:
    delays = select(records, task="delay")
    errors = dict(sorted(by_state(delays, "score").items()))
    largest, order = max(errors), list(errors.values())
    falls = all(after <= 1.02 * before for before, after in pairwise(order)) and order[-1] < order[0] / 2
    return [
        TEXTS.claim(
            "holds_delay",
            round(errors[largest], 3) <= PUBLISHED_DELAY,
            published=PUBLISHED_DELAY,
            error=errors[largest],
            state=largest,
            lag=delays[0]["lag"],
        ),
        TEXTS.claim("falls", falls, errors="; ".join(f"{n}: {error:.3f}" for n, error in errors.items())),
    ]


def _cost_claims(records: list[Record]) -> list[Claim]:
    (cost,) = select(records, task="cost")
    found = []
    for what, key, scale, unit in (("time", "seconds", 1e3, "ms"), ("memory", "peak_bytes", 2**-20, "MiB")):
        first, *_, last = cost[key]
        low, high = (scale * pick(cost[key].values()) for pick in (min, max))
        shown = {"what": what, "low": low, "high": high, "unit": unit, "first": first, "last": last}
        found.append(TEXTS.claim("cost", high <= FLAT * low, **shown))
    return found


def form_claims(records: list[Record]) -> list[Claim]:
    """About the recurrences, and the families beside each other."""
    trained = [record for record in records if record["task"] != "cost"]
    made = [record for record in trained if "score_recurrent" in record]
    apart = {
        task: max((abs(r["score_recurrent"] - r["score"]) for r in select(made, task=task)), default=0.0)
        for task in EQUAL
    }
    own = select(trained, family="rtf")
    companion = select(own, method="companion")
    same = len(made) == len(trained) and all(apart[task] <= most for task, most in EQUAL.items())
    found = [
        TEXTS.claim("forms", same, made=len(made), trained=len(trained), **apart),
        TEXTS.claim("companion", len(companion) == len(own), companion=len(companion), own=len(own)),
    ]
    for task in EQUAL:
        rows = select(trained, task=task)
        best = by_state(rows, "score")
        ours = best[max(best)]
        others = {name: _mean(select(rows, family=name), "score") for name in ("tnn", "sgconv")}
        shown = ", ".join(f"{NAMES[name]} {_figure(task, x)}" for name, x in others.items())
        ahead = all(ours >= x if task == "copying" else ours <= x for x in others.values())
        found.append(TEXTS.claim("ahead", ahead, task=task, ours=_figure(task, ours), others=shown))
    return found


def lag_per_layer(cell: Record) -> float:
    """Delay that each layer adds if all of them delay alike."""
    return float(cell["lag"] / cell["layers"])


def degrees(cell: Record) -> float:
    """Numbers that a signal up to frequency 0.25 has in a delay: twice the cut-off times the delay."""
    return float(2 * 0.25 * cell["lag"])


def _rates(records: list[Record]) -> str:
    """The peak learning rate, and those of the kernels."""
    kernels = {NAMES[record["family"]]: record["lr"] * record["kernel_lr_scale"] for record in records}
    of_kernels = ", ".join(f"{x:g} ({name})" for name, x in kernels.items())
    return f"{records[0]['lr']:g}, of kernels {of_kernels}"


def _task_items(records: list[Record]) -> list[Record]:
    task, items = records[0]["task"], []
    for (family, state), own in grouped(records, "family", "state_size").items():
        made = [record for record in own if "score_recurrent" in record]
        methods, orders = (dict.fromkeys(str(record[key]) for record in made) for key in ("method", "order"))
        items.append(
            {
                "label": NAMES[family],
                "state": state or "-",
                "parallel": _figure(task, _mean(own, "score")),
                "recurrent": _figure(task, _mean(made, "score_recurrent")) if made else "-",
                "of_chance": _figure(task, _mean(own, "chance")),
                "methods": ", ".join(methods) or "refused",
                "orders": ", ".join(orders) or "-",
                "pole": f"{max(record['largest_pole'] for record in made):.4f}" if made else "-",
                "ms": 1e3 * _mean(own, "seconds_per_step"),
            }
        )
    return items


def _copying_tables(records: list[Record]) -> list[Table]:
    copies = select(records, task="copying")
    copy = copies[0]
    bits = copy["lag"] * math.log2(copy["vocab_size"] - 2)  # in the symbols of a row
    numbers = {"symbols": copy["vocab_size"] - 2, "bits": bits, "numbers": bits / 32}
    values = copy | numbers | {"rates": _rates(copies), "per_layer": lag_per_layer(copy)}
    return [TEXTS.table("copying", _task_items(copies), **values)]


def _delay_tables(records: list[Record]) -> list[Table]:
    delays = select(records, task="delay")
    values = delays[0] | {"rates": _rates(delays), "degrees": degrees(delays[0])}
    return [TEXTS.table("delay", _task_items(delays), **values)]


def _cost_tables(records: list[Record]) -> list[Table]:
    (cost,) = select(records, task="cost")
    items = [
        {"state": n, "ms": 1e3 * seconds, "mib": cost["peak_bytes"][n] / 2**20}
        for n, seconds in cost["seconds"].items()
    ]
    return [TEXTS.table("cost", items, **cost)]


def afterwards(records: list[Record]) -> list[Table]:
    """Refused conversions, and what was tried."""
    found = []
    refused = dict.fromkeys(record["refused"] for record in records if record.get("refused"))
    if refused:
        told = "\n".join(f"- `{text}`" for text in refused)
        found.append(Table("## Conversions that were refused before another was taken", before=told))
    if select(records, task="copying")[0]["lag"] == _TRIED_AT:
        found.append(Table("## What was tried", before=TEXTS.text("tried")))
    return found


def _task_panel(task: str, records: list[Record]) -> list[Panel]:
    """RTF by its state, in both forms; others, which have none to choose, and chance as levels."""
    own = select(records, task=task)
    lines = [line("RTF, parallel", by_state(own, "score").items(), "rtf")]
    again = by_state(own, "score_recurrent").items()
    lines += [line("RTF, recurrent, step by step", again, "rtf", marker="x", linestyle="")] if again else []
    for name in ("tnn", "sgconv"):
        level = _mean(select(own, family=name), "score")
        lines.append(Line(NAMES[name], y=[level], style={"color": PALETTE[name]}))
    lines.append(Line("chance", y=[_mean(own, "chance")], style={"color": "grey", "linestyle": "--"}))
    mark, label = lag_per_layer(own[0]), "delay lines in series"
    if task == "delay":
        mark, label = degrees(own[0]), "numbers the signal has in a delay"
    lines.append(Line(label, x=[mark], style={"color": "black", "linestyle": ":"}))
    axes = {"xscale": "log", "xlabel": "state size", "ylabel": _LABELS[task]}
    axes |= {"yscale": "log"} if task == "delay" else {}
    return [Panel(task.capitalize(), lines, axes=axes, base=2)]


def _cost_panel(records: list[Record]) -> list[Panel]:
    (cost,) = select(records, task="cost")
    lines = []
    for key, what in (("seconds", "time"), ("peak_bytes", "memory")):
        first = next(iter(cost[key].values()))
        lines.append(line(f"{what}, relative", [(int(n), value / first) for n, value in cost[key].items()]))
    axes = {"xscale": "log", "xlabel": "state size", "ylim": (0, 2)}
    return [Panel("Cost of a training step, parallel form", lines, axes=axes, base=2)]


CLAIMS = {"copying": _copying_claims, "delay": _delay_claims, "cost": _cost_claims}
TABLES = {"copying": _copying_tables, "delay": _delay_tables, "cost": _cost_tables}
PANELS: dict[str, Callable[[list[Record]], list[Panel]]] = {
    "copying": partial(_task_panel, "copying"),
    "delay": partial(_task_panel, "delay"),
    "cost": _cost_panel,
}
