"""Tables as Markdown and figures as PNG, from plain descriptions of rows, lines and axes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnnlm.errors import UserError
from tnnlm.files import atomic_file

Texts = Mapping[str, str]
"""Cells of a table row, by column title."""


def declared(name: str) -> dict[str, Any]:
    """Return the contents of NAME.toml in this folder."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


PALETTE: dict[str, str] = {
    name: colour for colour, names in declared("report")["colours"].items() for name in names
}
"""Colour of each model or method, by name; others get the next colour of matplotlib's cycle."""


@dataclass(frozen=True)
class Table:
    """A heading, and a table of one row per item between two paragraphs."""

    heading: str = ""
    """Heading in Markdown, including the number signs."""
    items: Sequence[Texts] = ()
    before: str = ""
    after: str = ""

    def markdown(self) -> str:
        """Return the parts that are not empty, as paragraphs."""
        shown = table(self.items) if self.items else ""
        return "\n\n".join(part for part in (self.heading, self.before, shown, self.after) if part)


def table(items: Sequence[Texts]) -> str:
    """Return a table as Markdown, with a dash for each missing cell.

    Columns whose cells all begin with a digit or a sign are aligned to the right.

    Raises:
        UserError: If ``tabulate`` is not installed.
    """
    import pandas

    frame = pandas.DataFrame(list(items), dtype=object).fillna("-")
    align = ["right" if _figures(frame.iloc[:, i]) else "left" for i in range(frame.shape[1])]
    try:
        text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    except ImportError as error:
        remedy = "run `pip install -c constraints.txt -e '.[peers]'`"
        raise UserError(f"tabulate: not installed ({error})", remedy) from None
    # Padding to the widest cell would make lines of a thousand characters when one cell is a sentence.
    text = re.sub(r"-{3,}", "---", re.sub(r" +\|", " |", re.sub(r"\| +", "| ", text)))
    return re.sub(r"(?m)^\|[-:|]+\|$", lambda line: line[0].replace(":---|", "---|"), text)


def _figures(cells: Iterable[str]) -> bool:
    texts = [cell.strip("*") for cell in cells if cell not in ("-", "")]
    return bool(texts) and all(re.match(r"[-+]?\d", text) for text in texts)


@dataclass(frozen=True)
class Line:
    """Line through points; a horizontal line without ``x``, a vertical line at the first value without ``y``.

    A line without both is not plotted.
    """

    label: str
    x: Sequence[float] = ()
    y: Sequence[float] = ()
    style: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``Axes.plot``: color, marker, linestyle, alpha."""


@dataclass(frozen=True)
class Panel:
    """Contents of one subplot."""

    title: str = ""
    lines: Sequence[Line] = ()
    bars: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Height and colour of each bar, by the label below it."""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``Axes.set``: xlabel, ylabel, xscale, ylim."""
    base: int = 10
    """Base of a logarithmic x axis."""
    ticks: Mapping[float, str] = field(default_factory=dict)
    """Positions and labels of the ticks of the x axis; empty: matplotlib's choice."""
    legend: bool = True


def line(label: str, points: Iterable[Sequence[float]], name: str = "", **style: Any) -> Line:
    """Return a line with markers through points (x, y), in the colour of ``name`` or else of the label."""
    x, y = tuple(zip(*points, strict=True)) or ((), ())
    return Line(label, x, y, {"marker": "o", "markersize": 4, "color": PALETTE.get(name or label)} | style)


def smallest_shown(value: float) -> float:
    """Clip a value to the smallest one shown on a logarithmic axis, so that exact results are visible."""
    return max(value, 1e-9)


def figure(
    panels: Iterable[Panel], path: Path, columns: int = 0, size: tuple[float, float] = (5, 4), dpi: int = 110
) -> None:
    """Plot panels in a grid and write the PNG atomically.

    Args:
        panels: Panels, at least one.
        path: File to write.
        columns: Panels per row; 0: all in one row.
        size: Width and height of a panel, in inches.
        dpi: Dots per inch.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(panels)
    columns = columns or len(shown)
    rows = -(-len(shown) // columns)
    whole, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, shown, strict=False):
        _draw(ax, panel)
    with atomic_file(path) as temporary:
        whole.savefig(temporary, dpi=dpi, format="png")
    plt.close(whole)


def _draw(ax: Any, panel: Panel) -> None:
    for one in panel.lines:
        style = {key: value for key, value in one.style.items() if value is not None}
        if not (one.x or one.y):
            continue
        if not one.x:
            ax.axhline(one.y[0], label=one.label or None, **style)
        elif not one.y:
            ax.axvline(one.x[0], label=one.label or None, **style)
        else:
            ax.plot(one.x, one.y, label=one.label or None, **style)
    if panel.bars:
        heights, colours = zip(*panel.bars.values(), strict=True)
        ax.bar(range(len(heights)), heights, color=colours)
        ax.set_xticks(range(len(heights)), list(panel.bars), fontsize=7)
    ax.set(title=panel.title, **panel.axes)
    if panel.axes.get("xscale") == "log":
        ax.set_xscale("log", base=panel.base)
        ax.xaxis.set_major_formatter("{x:,g}")
    if panel.ticks:
        ax.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        ax.minorticks_off()
    ax.grid(visible=True, alpha=0.3)
    if panel.legend and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)
