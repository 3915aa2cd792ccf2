"""Tables as Markdown and pictures as PNG, from declarations: what stands in a column, what is drawn."""

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
"""title -> what stands below it"""


def declared(name: str) -> dict[str, Any]:
    """What NAME.toml beside this module holds."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


PALETTE: dict[str, str] = {
    name: colour for colour, names in declared("report")["colours"].items() for name in names
}
"""colour of everything that is drawn, by name; what has none takes matplotlib's next one"""


@dataclass(frozen=True)
class Table:
    """A heading, a text, and a table of one row per item."""

    heading: str = ""
    """Markdown, with its number signs"""
    items: Sequence[Texts] = ()
    before: str = ""
    after: str = ""

    def markdown(self) -> str:
        """The parts that are there, as paragraphs."""
        shown = table(self.items) if self.items else ""
        return "\n\n".join(part for part in (self.heading, self.before, shown, self.after) if part)


def table(items: Sequence[Texts]) -> str:
    """A table as Markdown, a dash where an item lacks a title that others have.

    Columns whose cells all begin with a digit or a sign are aligned to the right.

    Raises:
        UserError: if ``tabulate`` is missing.
    """
    import pandas

    frame = pandas.DataFrame(list(items), dtype=object).fillna("-")
    align = ["right" if _figures(frame.iloc[:, i]) else "left" for i in range(frame.shape[1])]
    try:
        text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    except ImportError as error:
        raise UserError(f"needs tabulate: pip install -c constraints.txt -e '.[peers]' ({error})") from None
    # Padding to the widest cell would make lines of a thousand characters where one cell is a sentence.
    text = re.sub(r"-{3,}", "---", re.sub(r" +\|", " |", re.sub(r"\| +", "| ", text)))
    return re.sub(r"(?m)^\|[-:|]+\|$", lambda line: line[0].replace(":---|", "---|"), text)


def _figures(cells: Iterable[str]) -> bool:
    texts = [cell.strip("*") for cell in cells if cell not in ("-", "")]
    return bool(texts) and all(re.match(r"[-+]?\d", text) for text in texts)


@dataclass(frozen=True)
class Line:
    """Points joined by a line; without ``x`` a level, without ``y`` a vertical mark at the first value.

    Without either nothing is drawn.
    """

    label: str
    x: Sequence[float] = ()
    y: Sequence[float] = ()
    style: Mapping[str, Any] = field(default_factory=dict)
    """as ``Axes.plot`` takes it: color, marker, linestyle, alpha"""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str = ""
    lines: Sequence[Line] = ()
    bars: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """name below a bar -> its height and colour"""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """as ``Axes.set`` takes it: xlabel, ylabel, xscale, ylim"""
    base: int = 10
    """of a logarithmic axis below"""
    ticks: Mapping[float, str] = field(default_factory=dict)
    """the only ones below, and what they say"""
    legend: bool = True


def line(label: str, points: Iterable[Sequence[float]], name: str = "", **style: Any) -> Line:
    """A line with dots through (x, y) in the colour that ``PALETTE`` has for ``name``, or for its label."""
    x, y = tuple(zip(*points, strict=True)) or ((), ())
    return Line(label, x, y, {"marker": "o", "markersize": 4, "color": PALETTE.get(name or label)} | style)


def smallest_shown(value: float) -> float:
    """A value that a logarithmic axis can show: what is exact stands at its foot."""
    return max(value, 1e-9)


def figure(
    drawn: Iterable[Panel], path: Path, columns: int = 0, size: tuple[float, float] = (5, 4), dpi: int = 110
) -> None:
    """Draw panels side by side and write them as PNG, whole or not at all.

    Args:
        drawn: panels, at least one.
        path: of the picture.
        columns: in a row; 0: all.
        size: inches of a panel.
        dpi: dots per inch.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(drawn)
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    whole, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels, strict=False):
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
