"""The picture of the experiment on the frequency-domain TNN: decay, speed, and what conversion costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.experiment import Row
from experiments.picture import save_picture
from experiments.ski_report import speedups, trained

_COLOURS = {
    "tnn": "#08519c",
    "tnn, decay 0.9": "#9ecae1",
    "fd gelu": "#31a354",
    "fd silu": "#756bb1",
    "fd relu": "#e6550d",
    "fd relu, angle": "#fdae6b",
}
_STYLES = {"cosine": "-", "angle": ":"}


def plot(rows: list[Row], path: Path) -> None:
    """Decay untrained and trained, speed against length, state of every conversion."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    _draw_untrained(axes[0], rows)
    _draw_trained(axes[1], rows)
    _draw_speed(axes[2], rows)
    _draw_states(axes[3], rows)
    for ax in axes:
        ax.grid(True, alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    save_picture(figure, path)


def _draw_untrained(ax: Any, rows: list[Row]) -> None:
    for row in (row for row in rows if row["kind"] == "decay" and row["norm"]):
        label = f"{row['activation']} of the {row['input']}"
        colour = _COLOURS[f"fd {row['activation']}"]
        _draw_tails(ax, row["tails"], colour, label, _STYLES[row["input"]])
    ax.set_title("kernels, untrained")
    ax.set_ylabel("share of the norm from this lag on")


def _draw_trained(ax: Any, rows: list[Row]) -> None:
    for name, own in trained(rows).items():
        tails = own[0]["tails"]
        worst = {lag: max(layer[lag] for layer in tails) for lag in tails[0]}
        _draw_tails(ax, worst, _COLOURS[name], name, "-")
    ax.set_title("trained, the layer with the longest memory")


def _draw_tails(ax: Any, tails: dict[str, float], colour: str, label: str, style: str) -> None:
    points = [(int(lag), max(left, 1e-9)) for lag, left in tails.items()]
    ax.loglog(*zip(*points, strict=True), style, color=colour, label=label, base=2)
    ax.set_yscale("log", base=10)
    ax.set_ylim(1e-9, 2)
    ax.set_xlabel("lag")


def _draw_speed(ax: Any, rows: list[Row]) -> None:
    timed = [row for row in rows if row["kind"] == "time"]
    for key, style in (("step_seconds", "-"), ("kernel_seconds", ":")):
        for name in speedups(timed[0], key):
            points = [(row["length"], speedups(row, key)[name]) for row in timed]
            label = f"{name}, {'step' if key == 'step_seconds' else 'kernel alone'}"
            ax.plot(*zip(*points, strict=True), style, marker="o", color=_COLOURS[name], label=label)
    ax.axhline(1, color="#636363", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_title("training speed over the TNN's")
    ax.set_xlabel("tokens a row")


def _draw_states(ax: Any, rows: list[Row]) -> None:
    models = trained(rows)
    methods = list(next(iter(models.values()))[0]["conversions"])
    for name, own in models.items():
        found = own[0]["conversions"]
        points = [
            (index, found[method]["state_bytes"] / 1024)
            for index, method in enumerate(methods)
            if "refused" not in found[method]
        ]
        ax.plot(*zip(*points, strict=True), "o", color=_COLOURS[name], label=name)
    ax.set_yscale("log")
    ax.set_xticks(range(len(methods)), methods, rotation=30)
    ax.set_title("state per sequence, KiB")
