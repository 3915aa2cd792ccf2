"""A comparison of conversions as Markdown tables and as pictures, from its plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tnnlm.files import atomic_file

COLOURS = {
    "etsc": "#e6550d",
    "balanced": "#08519c",
    "window": "#636363",
    "gradient": "#31a354",
    "without balancing": "#fdae6b",
    "vandermonde, real": "#9e9ac8",
    "vandermonde, random": "#54278f",
}
_MARKS = dict(zip(COLOURS, "osxDv^<", strict=True))


def tables(result: dict[str, Any]) -> str:
    """All parts that ``result`` has, as Markdown."""
    parts = [f"# Conversions compared: {result['source']}\n\n{result['about']}"]
    if "scaling" in result:
        parts += _scaling_tables(result["scaling"])
    if "perplexity" in result:
        parts.append(_perplexity_table(result["perplexity"]))
    if "order" in result:
        parts.append(_order_table(result["order"]))
    parts += [f"Note: {note}." for note in result.get("notes", ())]
    return "\n\n".join(parts) + "\n"


def speed_up(rows: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Smallest and largest of gradient's seconds over ETSC's, where both were measured."""
    seconds = {(row["method"], row["sweep"], row["n"], row["d"]): row.get("seconds") for row in rows}
    factors = [
        seconds[("gradient", *key)] / fast
        for (method, *key), fast in seconds.items()
        if method == "etsc" and fast and seconds.get(("gradient", *key))
    ]
    return (min(factors), max(factors)) if factors else None


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a picture of each part that ``result`` has; returns where they are."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    draws: dict[str, Callable[..., Any]] = {
        "scaling": _draw_scaling,
        "perplexity": _draw_perplexity,
        "order": _draw_order,
    }
    for part, draw in draws.items():
        if part in result:
            figure = draw(result[part], plt)
            with atomic_file(folder / f"{part}.png") as temporary:
                figure.savefig(temporary, dpi=110, format="png")
            plt.close(figure)
            written.append(folder / f"{part}.png")
    return written


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _scaling_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    parts = []
    for sweep, variable, fixed in (("length", "n", "d"), ("width", "d", "n")):
        chosen = [row for row in rows if row["sweep"] == sweep]
        columns = list(dict.fromkeys(row[variable] for row in chosen))
        methods = dict.fromkeys(row["method"] for row in chosen)
        cells = {(row["method"], row[variable]): row for row in chosen}
        parts.append(f"Relative tap error and seconds against {variable}, {fixed} = {chosen[0][fixed]}:")
        head = ["method", *(f"{variable} = {value:,}" for value in columns)]
        parts.append(_table(head, ([m, *(_cell(cells[m, value]) for value in columns)] for m in methods)))
    conditions = {row["n"]: row for row in rows if "condition" in row and row["method"].endswith("random")}
    for row in rows:
        if "condition" in row and row["method"].endswith("real") and row["n"] in conditions:
            other = conditions.pop(row["n"])["condition"]
            parts.append(
                f"Condition number of the Vandermonde system at n = {row['n']}: "
                f"{row['condition']:.0e} real, {other:.0e} random."
            )
    skipped = dict.fromkeys(f"{row['method']}: {row['skipped']}" for row in rows if "skipped" in row)
    if skipped:
        parts.append(f"Left out (-): {'; '.join(skipped)}.")
    factors = speed_up(rows)
    if factors:
        parts.append(f"ETSC is {factors[0]:,.0f} to {factors[1]:,.0f} times as fast as gradient descent.")
    return parts


def _cell(row: dict[str, Any]) -> str:
    return "-" if "skipped" in row else f"{row['error']:.1e}, {_seconds(row['seconds'])}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _perplexity_table(part: dict[str, Any]) -> str:
    contexts = list(part["contexts"])
    head = ["form", "state, kB", f"tap error below {part['trained']}", "on all lags"]
    lines = []
    for row in part["forms"]:
        cells = [row["form"], *("-" if row[key] is None else f"{row[key]:.1e}" for key in _ERRORS)]
        cells.insert(1, "-" if row["state_bytes"] is None else f"{row['state_bytes'] / 1e3:,.0f}")
        gaps = part["gap"].get(row["form"])
        for length in contexts:
            gap = f" ({100 * gaps[length]:+.4f} %)" if gaps else ""
            cells.append(f"{row['ppl'][length]:.4f}{gap}")
        lines.append(cells)
    title = "Perplexity (gap to parallel) by context; tokens scored: " + ", ".join(
        f"{tokens:,} at {length:,}" for length, tokens in part["contexts"].items()
    )
    notes = "".join(f"\n\nLeft out: {reason}." for reason in part["skipped"])
    return f"{title}.\n\n{_table([*head, *(f'{n:,} tokens' for n in contexts)], lines)}{notes}"


_ERRORS = ("error", "error_past")


def _order_table(part: dict[str, Any]) -> str:
    lines = []
    for row in part["rows"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        values = (f"{row[key]:.1e}" for key in ("bound", "hankel"))
        lines.append([str(row["layer"]), str(row["order"]), *values, ratio, f"{row['error']:.1e}"])
    head = ("layer", "order", "sigma_N+1 / sigma_1", "Hankel error / sigma_1", "ratio", "tap error")
    summary = "No bound above rounding at orders 4 to 32."
    if part["median_ratio"] is not None:
        summary = (
            f"Ratio at orders 4 to 32: median {part['median_ratio']:.2f}, largest {part['max_ratio']:.2f}."
        )
    return (
        f"Balanced reduction and the limit, horizon {part['horizon']}:\n\n{_table(head, lines)}\n\n{summary}"
    )


def _draw_scaling(rows: Sequence[dict[str, Any]], plt: Any) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharey="row")
    for column, (sweep, variable, fixed) in enumerate((("length", "n", "d"), ("width", "d", "n"))):
        chosen = [row for row in rows if row["sweep"] == sweep]
        for method in COLOURS:
            points = [row for row in chosen if row["method"] == method and "skipped" not in row]
            for axis, key in zip(axes[:, column], ("error", "seconds"), strict=True):
                # A window that is exact has no place on a logarithmic scale: it is shown at its foot.
                shown = [(p[variable], max(p[key], 1e-10) if math.isfinite(p[key]) else 1e10) for p in points]
                if shown:
                    style = {"color": COLOURS[method], "marker": _MARKS[method], "markersize": 5}
                    axis.plot(*zip(*shown, strict=True), label=method, **style)
        title = "channels" if variable == "d" else "taps"
        for axis, name in zip(axes[:, column], ("relative tap error", "seconds"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.set_xlabel(f"{title} {variable}, at {fixed} = {chosen[0][fixed]:,}")
            if column == 0:
                axis.set_ylabel(name)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_perplexity(part: dict[str, Any], plt: Any) -> Any:
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    lengths = list(part["contexts"])
    blues = plt.get_cmap("Blues")
    orders = [row["form"] for row in part["forms"] if row["form"].startswith("balanced")]
    for row in part["forms"][1:]:
        name = row["form"]
        gaps = [max(abs(part["gap"][name][length]), 1e-9) for length in lengths]
        colour = COLOURS[name.split(",")[0].split(" ")[0]]
        if name in orders:
            colour = blues(0.35 + 0.6 * orders.index(name) / max(1, len(orders) - 1))
        dashes = ":" if name.endswith(f"n = {part['horizon']}") else "-"
        label = f"{name} ({row['state_bytes'] / 1e3:,.0f} kB)"
        axis.plot(lengths, gaps, "o", linestyle=dashes, color=colour, label=label, markersize=5)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set_yscale("log")
    axis.set(xlabel="context in tokens", ylabel="relative perplexity gap to the parallel form, absolute")
    axis.axvline(part["trained"], color="black", linewidth=0.8, linestyle="--")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, title="form (state per sequence)")
    return figure


def _draw_order(part: dict[str, Any], plt: Any) -> Any:
    layers = sorted({row["layer"] for row in part["rows"]})
    columns = min(2, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 2.9 * lines), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    series = (
        ("error", "relative tap error", "#9ecae1", "s-"),
        ("hankel", "Hankel-norm error / $\\sigma_1$", "#08519c", "o-"),
        ("bound", "$\\sigma_{N+1} / \\sigma_1$: no recurrence is below", "#e6550d", "--"),
    )
    for layer, axis in zip(layers, axes.flat, strict=False):
        rows = [row for row in part["rows"] if row["layer"] == layer]
        for key, label, colour, style in series:
            values = [row[key] for row in rows]
            axis.plot([r["order"] for r in rows], values, style, color=colour, label=label, markersize=4)
        axis.set_yscale("log")
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("order N")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure
