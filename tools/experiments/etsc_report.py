"""What the etsc experiment says: claims, tables, a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from experiments.comparison_plots import COLOURS
from experiments.experiment import Row, Verdict
from experiments.picture import save_picture

EXACT = 1e-5
"""relative error of taps, stored in float32, up to which a conversion is exact to rounding"""
PARITY = 1e-4
"""relative difference of perplexities"""
GROWTH = 2.0
"""time of a token at the longest context over that at the shortest, up to which it counts as flat"""
NAMES = {"tnn": "TNN", "sgconv": "SGConv"}
_COLOURS = {
    "recompute": "#a50f15",
    "cached history": "#636363",
    "etsc, n = length": "#fdae6b",
    "etsc, n = horizon": "#e6550d",
    "balanced": "#08519c",
}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What holds and what does not."""
    converted = [row for row in rows if row["part"] == "conversion"]
    errors = [row["methods"]["etsc"]["error"] for row in converted]
    sizes = f"n {_span(converted, 'n')}, d {_span(converted, 'd')}"
    beside = [row["methods"] for row in converted if "seconds" in row["methods"]["gradient"]]
    faster = [methods["gradient"]["seconds"] / methods["etsc"]["seconds"] for methods in beside]
    closer = [methods["gradient"]["error"] / methods["etsc"]["error"] for methods in beside]
    found = [
        _equal_perplexity([row for row in rows if row.get("family") == family], label)
        for family, label in NAMES.items()
    ]
    found += [
        Verdict(
            "the conversion is exact, at every number of taps and channels",
            "errors near machine precision, n and d = 64 .. 16,384",
            f"largest relative error {max(errors):.1e} in float32, {sizes}",
            max(errors) <= EXACT,
        ),
        Verdict(
            "it takes a tenth of gradient descent's time or less, and is closer",
            "orders of magnitude",
            f"{min(faster):,.0f} to {max(faster):,.0f} times faster, errors {min(closer):,.0f} times smaller "
            "or more",
            min(faster) >= 10 and min(closer) > 1,
        ),
    ]
    cost = [row for row in rows if row["part"] == "cost" and row["sweep"] == "length"]
    found += [
        _flat(cost, "etsc, n = horizon", "by ETSC, at the horizon at which the kernel has died out"),
        _flat(cost, "balanced", "by our reduced form"),
    ]
    longest = max(cost, key=lambda row: int(row["length"]))
    for form in ("recompute", "cached history"):
        ratio = longest["seconds"][form] / longest["seconds"]["etsc, n = horizon"]
        found.append(
            Verdict(
                f"a token by ETSC is cheaper than by {form}, at {longest['length']:,} tokens",
                "the gap grows with the length",
                f"{ratio:.1f} times as fast",
                ratio > 1,
            )
        )
    every = [row for row in rows if row["part"] == "cost"]
    speed = [row["seconds"]["etsc, n = length"] / row["seconds"]["balanced"] for row in every]
    memory = [row["kept"]["etsc, n = length"] / row["kept"]["balanced"] for row in every]
    found.append(
        Verdict(
            "our reduced form is cheaper than ETSC, at every length, width and depth",
            "-",
            f"{min(speed):.1f} to {max(speed):.1f} times as fast (median {median(speed):.1f}), state "
            f"{min(memory):.1f} to {max(memory):.0f} times smaller",
            min(speed) > 1 and min(memory) > 1,
        )
    )
    return found


def _equal_perplexity(rows: list[Row], label: str) -> Verdict:
    gaps = [context["gap"]["etsc"] for row in rows for context in row["contexts"].values()]
    lengths = [int(length) for row in rows for length in row["contexts"]]
    return Verdict(
        f"perplexity of {label} is the same before and after, at every length",
        "equal to the printed digits",
        f"largest relative difference {max(map(abs, gaps)):.1e}, {min(lengths):,} to {max(lengths):,} tokens",
        max(map(abs, gaps)) <= PARITY,
    )


def _flat(rows: list[Row], form: str, label: str) -> Verdict:
    shortest, longest = (pick(rows, key=lambda row: int(row["length"])) for pick in (min, max))
    growth = longest["seconds"][form] / shortest["seconds"][form]
    same = longest["bytes"][form] <= 1.01 * shortest["bytes"][form]
    return Verdict(
        f"time and memory of a token do not grow with the context, {label}",
        "flat",
        f"{1e3 * shortest['seconds'][form]:.2f} ms at {shortest['length']:,}, "
        f"{1e3 * longest['seconds'][form]:.2f} ms at {longest['length']:,}; memory "
        + ("the same" if same else "grows"),
        growth <= GROWTH and same,
    )


def tables(rows: list[Row]) -> str:
    """Perplexity, conversion, cost."""
    return "\n\n".join([_perplexity(rows), *_conversion(rows), *_cost(rows)])


def _perplexity(rows: list[Row]) -> str:
    own = [row for row in rows if row["part"] == "perplexity"]
    lengths = [f"{int(length):,}" for length in own[0]["contexts"]]
    lines = [f"| model | form | {' | '.join(lengths)} |", "|---|---|" + "---:|" * len(lengths)]
    for row in own:
        contexts = row["contexts"]
        for form, label in {"parallel": "parallel", "etsc": "ETSC, n = length", "auto": "auto"}.items():
            cells = " | ".join(_ppl(context[form]) for context in contexts.values())
            lines.append(f"| {NAMES[row['family']]} | {label} | {cells} |")
    return (
        "## Perplexity before and after conversion\n\n"
        + "\n".join(lines)
        + "\n\nHeld-out text in rows of each length, trained at the first; the recurrent forms are run, not "
        "simulated. auto: what `convert.py conversion.method=auto` makes, once, for all lengths."
    )


def _ppl(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "refused"


def _conversion(rows: list[Row]) -> list[str]:
    parts = []
    for sweep, size, what in (("length", "n", "number of taps"), ("width", "d", "number of channels")):
        own = [row for row in rows if row["part"] == "conversion" and row["sweep"] == sweep]
        if not own:
            continue
        fixed = "d" if size == "n" else "n"
        lines = [f"| {size} | {' | '.join(COLOURS)} |", "|---:|" + "---:|" * len(COLOURS)]
        for row in own:
            cells = " | ".join(_made(row["methods"][method]) for method in COLOURS)
            lines.append(f"| {row[size]:,} | {cells} |")
        parts.append(
            f"## Conversion against the {what}\n\n"
            + "\n".join(lines)
            + f"\n\n{fixed} = {own[0][fixed]:,}, taps of an untrained TNO layer. Relative error of the taps, "
            "in float32, and time. balanced and gradient: 32 real state numbers per channel; gradient: 1,000 "
            "steps of Adam on at most 2^17 taps; Vandermonde: residues solved for given poles, up to 512 "
            "taps."
        )
    return parts


def _made(cell: Row) -> str:
    return f"{cell['error']:.1e}, {_seconds(cell['seconds'])}" if "error" in cell else "-"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _cost(rows: list[Row]) -> list[str]:
    parts = []
    for sweep in ("length", "width", "depth"):
        own = [row for row in rows if row["part"] == "cost" and row["sweep"] == sweep]
        fixed = ", ".join(
            f"{name} {own[0][name]:,}" for name in ("length", "width", "depth") if name != sweep
        )
        lines = [f"| {sweep} | {' | '.join(_COLOURS)} |", "|---:|" + "---:|" * len(_COLOURS)]
        for row in own:
            cells = (
                f"{_seconds(row['seconds'][form])}, {row['bytes'][form] / 1e6:.3g} MB" for form in _COLOURS
            )
            lines.append(f"| {row[sweep]:,} | {' | '.join(cells)} |")
        parts.append(f"## Cost of a token against {sweep}\n\n" + "\n".join(lines) + f"\n\nAt {fixed}.")
    parts[-1] += (
        " Untrained TNN of 256 tokens in its vocabulary, decay 0.99, eager float32, one sequence, forms in "
        "turns, medians. Memory: the state, and what a step allocates at its peak; weights are left out. "
        "recompute: the whole sequence again by FFT. cached history: every input of the past times its tap. "
        "ETSC with as many modes as tokens is exact as far as these; at the horizon where the kernel has "
        "died out it is so for ever. At 64 tokens ETSC and our form take what calling the operations takes."
    )
    return parts


def plot(rows: list[Row], path: Path) -> None:
    """Error and time of conversion above, time and memory of a token below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    for place, (sweep, size) in enumerate((("length", "n"), ("width", "d"))):
        own = [row for row in rows if row["part"] == "conversion" and row["sweep"] == sweep]
        for shift, (key, label) in enumerate((("error", "relative error"), ("seconds", "seconds"))):
            ax = axes[0][2 * place + shift]
            for method, colour in COLOURS.items():
                cells = [(row[size], row["methods"][method]) for row in own]
                points = [(x, max(cell[key], 1e-9)) for x, cell in cells if key in cell]
                _line(ax, points, method, colour)
            ax.set(xlabel="taps" if size == "n" else "channels", title=f"conversion: {label}")
    panels = (
        ("length", "seconds", "seconds per token"),
        ("length", "bytes", "bytes"),
        ("width", "seconds", "seconds per token"),
        ("depth", "seconds", "seconds per token"),
    )
    for ax, (sweep, key, label) in zip(axes[1], panels, strict=True):
        own = [row for row in rows if row["part"] == "cost" and row["sweep"] == sweep]
        for form, colour in _COLOURS.items():
            _line(ax, [(row[sweep], row[key][form]) for row in own], form, colour)
        ax.set(xlabel="context" if sweep == "length" else sweep, title=f"a token: {label}")
    for line in axes:
        line[0].legend(fontsize=7)
        for ax in line:
            ax.grid(alpha=0.3)
    save_picture(figure, path)


def _line(ax: Any, points: Iterable[tuple[float, float]], label: str, colour: str) -> None:
    found = list(points)
    if found:
        ax.plot(*zip(*found, strict=True), "o-", markersize=3, color=colour, label=label)
        ax.set(xscale="log", yscale="log")


def _span(rows: list[Row], key: str) -> str:
    values = [int(row[key]) for row in rows]
    return f"{min(values):,} .. {max(values):,}"
