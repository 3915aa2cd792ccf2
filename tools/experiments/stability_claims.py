"""What the experiment on stability says: thresholds, tables, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from experiments.frame import Claim, Declarations, Record, select
from experiments.report import PALETTE, Column, Line, Panel, Table, line, smallest_shown

FAILED = 0.1
"""relative error of outputs above which a conversion is of no use"""
ROUNDING = 1e-4
"""of outputs, in float32, below which a conversion counts as exact"""
DEAD = 1e-7
"""share of a kernel's norm past the horizon below which it has died out there"""
FACTORS = {
    "length": ("n", "number of taps"),
    "decay": ("decay", "decay per lag"),
    "depth": ("depth", "layers of the position encoder"),
    "initialisation": ("init", "initialisation"),
    "precision": ("stored", "poles and residues stored in"),
    "taps": ("source", "distribution of the taps"),
    "poles": ("distance", "distance of the poles from the unit circle"),
    "layers": ("layers", "layers of the model"),
}
"""sweep -> the setting that it changes, and what that is"""
TEXTS = Declarations("stability")


def claims(records: list[Record]) -> list[Claim]:
    """What holds and what does not."""
    told = [record for record in records if "l1_error" in record]
    ordinary = [r for r in told if r["sweep"] in ("length", "depth", "initialisation", "decay")]
    exact = select(ordinary, method="etsc")
    dead = [record for record in exact if record["tail"] <= DEAD]
    alive = [record for record in exact if record["tail"] > DEAD]
    reduced = [r for r in select(records, method="balanced") if r["sweep"] != "precision"]
    made = [record for record in reduced if "tap_error" in record]
    # Rounding of the outputs, in units of the largest possible one.
    unsaid = [record for record in told if _failed(record) and not record["told"]]
    silent = [record for record in told if not record["bounded_error"] <= record["l1_error"] + 1e-5]
    failing = [r["n"] for r in select(records, method="vandermonde", sweep="length") if _failed(r)]
    largest = max((record["largest_pole"] for record in told), default=0.0)
    rounded = all(r["tap_error"] <= 1e-5 and r["inside_error"] <= ROUNDING for r in exact)
    stays = bool(dead) and all(record["output_error"] <= ROUNDING for record in dead)
    failed = sum(map(_failed, alive))
    useless = f"from {min(failing)} taps on" if failing else "not at these lengths"
    warned = f"{sum(map(_failed, told))} cells warned of"
    if unsaid:
        warned = f"silent in {len(unsaid)}; first {_name(unsaid[0])}"
    bound = f"{len(told)} cells" if not silent else f"not in {len(silent)}; first {_name(silent[0])}"
    taps, inside = _largest(exact, "tap_error"), _largest(exact, "inside_error")
    past, beyond = _largest(dead, "output_error"), _largest(alive, "output_error")
    met, refused = all(record["tap_error"] <= 1.001e-3 for record in made), len(reduced) - len(made)
    worst = _largest(made, "tap_error")
    return [
        TEXTS.claim("exact", rounded, taps=taps, outputs=inside),
        TEXTS.claim("dead", stays, outputs=past, count=len(dead)),
        TEXTS.claim("alive", not failed, failed=failed, count=len(alive), outputs=beyond),
        TEXTS.claim("balanced", met, made=len(made), taps=worst, refused=refused),
        TEXTS.claim("poles", largest <= 1 + 1e-6, largest=largest),
        TEXTS.claim("eigenvalues", bool(failing), found=useless),
        TEXTS.claim("warned", not unsaid, found=warned),
        TEXTS.claim("bound", not silent, found=bound),
    ]


def tables(records: list[Record]) -> list[Table]:
    """A table per factor: errors of taps and outputs, and where each method fails."""
    found = [Table("## By factor", before=TEXTS.text("factors", failed=FAILED))]

    def cell(own: list[Record], setting: str, method: str, value: Any) -> str:
        return _cell(select(own, method=method, **{setting: value})[0])

    for sweep, (setting, label) in FACTORS.items():
        own = select(records, sweep=sweep)
        columns: dict[str, Column] = {setting: _shown}
        columns |= {
            method: partial(cell, own, setting, method)
            for method in dict.fromkeys(record["method"] for record in own)
        }
        values = list(dict.fromkeys(record[setting] for record in own))
        found.append(Table(f"### {label.capitalize()}", columns, values))
    return [*found, _thresholds(records)]


def _thresholds(records: list[Record]) -> Table:
    """Where each method fails, by factor, and what the user reads there."""

    def where(key: str, row: tuple[str, list[Record]]) -> str:
        """The failing settings: all, none, or by name."""
        failing = [record for record in row[1] if _above(record, key)]
        if len(failing) == len(row[1]) > 1:
            return "all"
        return ", ".join(_shown(record[FACTORS[row[0]][0]]) for record in failing) or "-"

    def told(row: tuple[str, list[Record]]) -> str:
        keys = ("inside_error", "output_error", "refused")
        failing = [record for record in row[1] if any(_above(record, key) for key in keys)]
        return f"`{failing[0].get('told') or 'nothing'}`" if failing else ""

    rows = [
        (sweep, select(records, sweep=sweep, method=method))
        for sweep in FACTORS
        for method in dict.fromkeys(record["method"] for record in select(records, sweep=sweep))
        if method != "vandermonde"
    ]
    columns: dict[str, Column] = {
        "factor": lambda row: FACTORS[row[0]][1],
        "method": lambda row: str(row[1][0]["method"]),
        "of no use within the horizon": partial(where, "inside_error"),
        "after four": partial(where, "output_error"),
        "refused": partial(where, "refused"),
        "told at the first": told,
    }
    return Table("## Thresholds", columns, rows, before=TEXTS.text("thresholds", failed=FAILED))


def panels(records: list[Record]) -> list[Panel]:
    """A panel per factor that is a number: errors within the horizon above, after four of them below."""
    found: list[Panel] = []
    kinds = {"inside_error": "within the horizon", "output_error": "after four horizons"}
    for key, what in kinds.items():
        for sweep in ("length", "decay", "depth", "poles", "layers"):
            lines = []
            for method in dict.fromkeys(record["method"] for record in records):
                own = select(records, sweep=sweep, method=method)
                finite = [record for record in own if math.isfinite(record.get(key, math.nan))]
                points = [(_position(record), smallest_shown(record[key])) for record in finite]
                lines += [line(method, points)] if points else []
            limit = Line("", y=[FAILED], style={"color": PALETTE["limit"], "linestyle": ":"})
            below = "1 - decay (none drawn at 1e-5)" if sweep == "decay" else FACTORS[sweep][1]
            axes = {"xscale": "log", "yscale": "log", "ylim": (1e-9, 1e2), "xlabel": below}
            found.append(Panel(f"error {what}", [*lines, limit], axes=axes, legend=not found))
    return found


def _position(record: Record) -> float:
    value = float(record[FACTORS[record["sweep"]][0]])
    return max(1 - value, 1e-5) if record["sweep"] == "decay" else value


def _above(record: Record, key: str) -> bool:
    """A refusal, or an error of no use; NaN is one."""
    return bool(record.get(key)) if key == "refused" else key in record and not record[key] <= FAILED


def _failed(record: Record) -> bool:
    """Refused counts as failing; what was left out does not."""
    return _above(record, "refused") or _above(record, "output_error")


def _cell(record: Record) -> str:
    if record.get("refused"):
        return "refused"
    if "output_error" not in record:
        return "-"
    return " / ".join(_error(record[key]) for key in ("inside_error", "output_error") if key in record)


def _error(value: float) -> str:
    return f"{value:.1e}" if value <= FAILED else f"**{value:.1e}**"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _largest(records: Iterable[Record], key: str) -> str:
    worst = max(records, key=lambda record: float(record[key]), default=None)
    return "not measured" if worst is None else f"{worst[key]:.1e} ({_name(worst)})"


def _name(record: Record) -> str:
    return f"{record['method']}, {record['sweep']} {record[FACTORS[record['sweep']][0]]}"
