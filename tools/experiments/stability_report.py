"""What the stability experiment says: thresholds, tables, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.experiment import Row, Verdict
from experiments.picture import save_picture

FAILED = 0.1
"""relative error of outputs above which a conversion is of no use"""
ROUNDING = 1e-4
"""of outputs, in float32, below which a conversion counts as exact"""
DEAD = 1e-7
"""share of a kernel's norm past the horizon below which it has died out there"""
FACTORS = {
    "length": "n",
    "decay": "decay",
    "depth": "depth",
    "initialisation": "init",
    "precision": "stored",
    "taps": "source",
    "poles": "distance",
    "layers": "layers",
}
"""sweep -> the setting that it changes"""
_LABELS = {
    "length": "number of taps",
    "decay": "decay per lag",
    "depth": "layers of the position encoder",
    "initialisation": "initialisation",
    "precision": "poles and residues stored in",
    "taps": "distribution of the taps",
    "poles": "distance of the poles from the unit circle",
    "layers": "layers of the model",
}
_COLOURS = {"etsc": "#e6550d", "balanced": "#08519c", "window": "#636363", "vandermonde": "#9e9ac8"}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What holds and what does not."""
    told = [row for row in rows if "l1_error" in row]
    ordinary = [row for row in told if row["sweep"] in ("length", "depth", "initialisation", "decay")]
    exact = [row for row in ordinary if row["method"] == "etsc"]
    dead = [row for row in exact if row["tail"] <= DEAD]
    alive = [row for row in exact if row["tail"] > DEAD]
    reduced = [row for row in rows if row["method"] == "balanced" and row["sweep"] != "precision"]
    made = [row for row in reduced if "tap_error" in row]
    # Rounding of the outputs, in units of the largest possible one.
    unsaid = [row for row in told if _failed(row) and not row["told"]]
    silent = [row for row in told if not row["bounded_error"] <= row["l1_error"] + 1e-5]
    naive = [row for row in rows if row["method"] == "vandermonde" and row["sweep"] == "length"]
    failing = [row["n"] for row in naive if _failed(row)]
    largest = max((row["largest_pole"] for row in told), default=0.0)
    return [
        Verdict(
            "ETSC is exact to rounding within its horizon, at every length, depth, decay and initialisation",
            "errors near machine precision, n = 64 .. 16,384",
            f"taps {_largest(exact, 'tap_error')}; outputs {_largest(exact, 'inside_error')}",
            all(row["tap_error"] <= 1e-5 and row["inside_error"] <= ROUNDING for row in exact),
        ),
        Verdict(
            "ETSC stays exact past its horizon where the kernel has died out there",
            "-",
            f"outputs {_largest(dead, 'output_error')}, of {len(dead)} cells",
            bool(dead) and all(row["output_error"] <= ROUNDING for row in dead),
        ),
        Verdict(
            "ETSC is of use past its horizon where the kernel has not died out",
            "-",
            f"useless in {sum(map(_failed, alive))} of {len(alive)} cells; {_largest(alive, 'output_error')}",
            not any(map(_failed, alive)),
        ),
        Verdict(
            "balanced meets its tolerance of 1e-3 or refuses",
            "-",
            f"{len(made)} made, {_largest(made, 'tap_error')}; {len(reduced) - len(made)} refused",
            all(row["tap_error"] <= 1.001e-3 for row in made),
        ),
        Verdict(
            "closed forms never leave the unit disc",
            "-",
            f"largest modulus of a pole {largest:.9f}",
            largest <= 1 + 1e-6,
        ),
        Verdict(
            "residues solved for given real eigenvalues are useless",
            "error grows with n (ETSC paper, section 4.4)",
            f"from {min(failing)} taps on" if failing else "not at these lengths",
            bool(failing),
        ),
        Verdict(
            "wherever outputs are of no use, the report warns, or the conversion is refused",
            "-",
            f"{sum(map(_failed, told))} cells warned of"
            if not unsaid
            else f"silent in {len(unsaid)}; first {_name(unsaid[0])}",
            not unsaid,
        ),
        Verdict(
            "float32 steps stay within the certificate's bound on outputs, in every case",
            "-",
            f"{len(told)} cells" if not silent else f"not in {len(silent)}; first {_name(silent[0])}",
            not silent,
        ),
    ]


def tables(rows: list[Row]) -> str:
    """A table per factor: errors of taps and outputs, and where each method fails."""
    parts = [
        "## By factor\n\nRelative error of outputs to noise, step by step in float32 (float64 where stored "
        f"so): in the second half of the horizon / after four horizons. Bold: above {FAILED:g}, of no use. "
        "Not varied: a TNO kernel of 512 taps, decay 0.99, 3 layers, on horizons as given; convert.py "
        "takes one at which the kernel has died out."
    ]
    for sweep, setting in FACTORS.items():
        own = [row for row in rows if row["sweep"] == sweep]
        methods = list(dict.fromkeys(row["method"] for row in own))
        lines = [f"### {_LABELS[sweep].capitalize()}", ""]
        lines += [f"| {setting} | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
        for value in dict.fromkeys(row[setting] for row in own):
            cells = {row["method"]: _cell(row) for row in own if row[setting] == value}
            shown = f"{value:g}" if isinstance(value, int | float) else value
            lines.append(f"| {shown} | {' | '.join(cells[method] for method in methods)} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _thresholds(rows)])


def _thresholds(rows: list[Row]) -> str:
    """Where each method fails, by factor, and what the user reads there."""
    lines = [
        "| factor | method | of no use within the horizon | after four | refused | told at the first |",
        "|---|---|---|---|---|---|",
    ]
    for sweep, setting in FACTORS.items():
        own = [row for row in rows if row["sweep"] == sweep and row["method"] != "vandermonde"]
        for method in dict.fromkeys(row["method"] for row in own):
            of_method = [row for row in own if row["method"] == method]
            inside = [row for row in of_method if _above(row, "inside_error")]
            after = [row for row in of_method if _above(row, "output_error")]
            refused = [row for row in of_method if row.get("refused")]
            first = next((row for row in of_method if row in inside or row in after or row in refused), None)
            told = "" if first is None else f"`{first.get('told') or 'nothing'}`"
            where = (_values(part, of_method, setting) for part in (inside, after, refused))
            lines.append(f"| {_LABELS[sweep]} | {method} | {' | '.join(where)} | {told} |")
    return (
        f"## Thresholds\n\nSettings at which outputs are off by more than {FAILED:g}, or a conversion is "
        "refused, and what `convert.py` says at the first of them.\n\n" + "\n".join(lines)
    )


def _values(failing: list[Row], every: list[Row], setting: str) -> str:
    """The failing settings: all, none, or by name."""
    if not failing:
        return "-"
    if len(failing) == len(every) > 1:
        return "all"
    return ", ".join(
        f"{row[setting]:g}" if isinstance(row[setting], int | float) else row[setting] for row in failing
    )


def _above(row: Row, key: str) -> bool:
    return key in row and not row[key] <= FAILED


def plot(rows: list[Row], path: Path) -> None:
    """A panel per factor that is a number."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = ("length", "decay", "depth", "poles", "layers")
    kinds = {"inside_error": "within the horizon", "output_error": "after four horizons"}
    figure, axes = plt.subplots(
        2, len(panels), figsize=(15, 6), sharey=True, sharex="col", layout="constrained"
    )
    for line, (key, what) in zip(axes, kinds.items(), strict=True):
        for ax, sweep in zip(line, panels, strict=True):
            for method, colour in _COLOURS.items():
                own = [row for row in rows if row["sweep"] == sweep and row["method"] == method]
                points = [(_position(row), max(row[key], 1e-9)) for row in own if _finite(row, key)]
                if points:
                    ax.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=method)
            if not ax.lines:  # of whole models only the one error is measured
                ax.set_axis_off()
                continue
            ax.axhline(FAILED, color="#a50f15", linewidth=0.8, linestyle=":")
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_ylim(1e-9, 1e2)
            ax.grid(True, alpha=0.3)
        line[0].set_ylabel(f"relative error of outputs\n{what}")
    for ax, sweep in zip(axes[1], panels, strict=True):
        ax.set_xlabel("1 - decay (none drawn at 1e-5)" if sweep == "decay" else _LABELS[sweep])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    save_picture(figure, path)


def _position(row: Row) -> float:
    value = float(row[FACTORS[row["sweep"]]])
    return max(1 - value, 1e-5) if row["sweep"] == "decay" else value


def _finite(row: Row, key: str) -> bool:
    return math.isfinite(row.get(key, math.nan))


def _failed(row: Row) -> bool:
    """Refused counts as failing; NaN too; what was left out does not."""
    return bool(row.get("refused")) or ("output_error" in row and not row["output_error"] <= FAILED)


def _cell(row: Row) -> str:
    if row.get("refused"):
        return "refused"
    if "output_error" not in row:
        return "-"
    shown = [_error(row[key]) for key in ("inside_error", "output_error") if key in row]
    return " / ".join(shown)


def _error(value: float) -> str:
    return f"{value:.1e}" if value <= FAILED else f"**{value:.1e}**"


def _largest(rows: Iterable[Row], key: str) -> str:
    worst = max(rows, key=lambda row: float(row[key]), default=None)
    return "not measured" if worst is None else f"{worst[key]:.1e} ({_name(worst)})"


def _name(row: Row) -> str:
    setting: Any = row[FACTORS[row["sweep"]]]
    return f"{row['method']}, {row['sweep']} {setting}"
