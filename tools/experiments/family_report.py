"""A comparison of families as Markdown tables and as a picture, from its plain data."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tnnlm.files import atomic_file

COLOURS = {"tnn": "#08519c", "sgconv": "#31a354", "rtf": "#756bb1", "transformer": "#e6550d"}
_MORE = ("#636363", "#c51b8a", "#8c6d31", "#17becf")
_MEANINGS = (
    "Bits per byte: mean ± standard deviation over the seeds, parallel form, at the training length. "
    "Training tokens/s: the median over windows of 10 steps, then over seeds.",
    "The form that decodes, and what one more token costs after each context: medians, families in turns, "
    "one sequence. The Transformer's cache is the DynamicCache of transformers, which copies itself at "
    "each token.",
    "Perplexity on the same held-out tokens, read in rows of each length. Gap: of the recurrent form to the "
    "parallel one, relative, at the training length.",
)


def bits(row: dict[str, Any]) -> list[float]:
    """Bits per byte of every seed."""
    return [cell["bits_per_byte"] for cell in row["seeds"].values()]


def tables(result: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    rows = result["rows"]
    parts = [
        "# Families compared",
        _about(result),
        f"## Quality\n\n{_quality(rows)}\n\n{_MEANINGS[0]}",
        f"## Speed and state\n\n{_cost(rows, result['contexts'])}\n\n{_MEANINGS[1]}",
        f"## Perplexity against length\n\n{_lengths(rows)}\n\n{_MEANINGS[2]}",
    ]
    notes = [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    notes += [f"{row['family']}, {reason}" for row in rows for reason in row["perplexity"]["missing"]]
    return "\n\n".join([*parts, *notes]) + "\n"


def _about(result: dict[str, Any]) -> str:
    model, trainer = (result["settings"][group] for group in ("model", "trainer"))
    machine, tokens = result["machine"], next(iter(result["rows"][0]["seeds"].values()))["tokens"]
    return (
        f"d_model {model['d_model']}, {model['n_layers']} layers, vocabulary {model['vocab_size']:,}, rows "
        f"of {model['max_length']:,} tokens; {trainer['max_steps']:,} steps, {tokens:,} tokens, for all the "
        f"same in the same order; seeds {', '.join(map(str, result['seeds']))}. {machine['device']}, "
        f"{machine['threads']} threads, PyTorch {machine['torch']}, training in {machine['precision']}."
    )


def _quality(rows: Sequence[dict[str, Any]]) -> str:
    head = ("family", "mixes by", "parameters", "learning rate", "bits per byte", "training tokens/s")
    lines = []
    for row in rows:
        speed = statistics.median(cell["tokens_per_second"] for cell in row["seeds"].values())
        values = bits(row)
        shown = f"{statistics.mean(values):.4f}"
        if len(values) > 1:
            shown += f" ± {statistics.stdev(values):.4f}"
        size = f"{row['params']:,}"
        lines.append([row["family"], row["kernel"], size, f"{row['lr']:g}", shown, f"{speed:,.0f}"])
    return _table(head, lines, left=2)


def _cost(rows: Sequence[dict[str, Any]], contexts: Sequence[int]) -> str:
    head = ["family", "form", "methods", "orders"]
    for name in ("state bytes", "ms per token"):
        head += [f"{name} at {context:,}" for context in contexts]
    lines = []
    for row in rows:
        if row["decoding"] is None:
            continue
        form = row["perplexity"]["forms"][-1]
        cells = [row["decoding"][str(context)] for context in contexts]
        lines.append(
            [
                *(row["family"], form["form"], ", ".join(dict.fromkeys(form["methods"])) or "-"),
                ", ".join(map(str, form["orders"])) or "-",
                *(f"{cell['state_bytes']:,}" for cell in cells),
                *(f"{1e3 * cell['seconds_per_token']:.2f}" for cell in cells),
            ]
        )
    return _table(head, lines, left=4)


def _lengths(rows: Sequence[dict[str, Any]]) -> str:
    lengths = list(rows[0]["perplexity"]["parallel"])
    lines = []
    for row in rows:
        parallel = row["perplexity"]["parallel"]
        values = (f"{value:.3f}" for value in parallel.values())
        lines.append([row["family"], "parallel", *values, "", ""])
        for form in row["perplexity"]["forms"]:
            gap = form["ppl"][lengths[0]] / parallel[lengths[0]] - 1
            values = (f"{value:.3f}" for value in form["ppl"].values())
            horizon = f"{form['horizon']:,}" if "horizon" in form else ""
            lines.append([row["family"], form["form"], *values, f"{gap:.0e}", horizon])
    head = ("family", "form", *(f"{int(length):,}" for length in lengths), "gap", "horizon")
    return _table(head, lines, left=2)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> str:
    names = list(head)
    lines = [names, ["---"] * left + ["---:"] * (len(names) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw bits per byte, training curves, perplexity against length, and time per token."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    more = itertools.cycle(_MORE)
    colours = {row["family"]: COLOURS.get(row["family"]) or next(more) for row in rows}
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.5), layout="constrained")
    _draw_bits(axes[0, 0], rows, colours)
    _draw_curves(axes[0, 1], rows, colours)
    _draw_lengths(axes[1, 0], rows, colours)
    _draw_time(axes[1, 1], rows, result["contexts"], colours)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _draw_bits(axis: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    for place, row in enumerate(rows):
        values = bits(row)
        mean = statistics.mean(values)
        axis.plot([place - 0.25, place + 0.25], [mean, mean], color=colours[row["family"]], linewidth=2)
        spread = [place + 0.04 * (i - (len(values) - 1) / 2) for i in range(len(values))]
        axis.scatter(spread, values, color=colours[row["family"]], s=22, zorder=3)
        axis.annotate(f"{mean:.3f}", (place + 0.27, mean), va="center", fontsize=9)
    axis.set_xticks(range(len(rows)), [row["family"] for row in rows])
    axis.set_xlim(-0.5, len(rows) - 0.3)
    axis.margins(y=0.2)
    axis.set_ylabel("bits per byte")
    axis.set_title("held-out text: every seed and the mean", fontsize=10)
    axis.grid(alpha=0.3, axis="y")


def _draw_curves(axis: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    from matplotlib.ticker import EngFormatter

    for row in rows:
        for i, cell in enumerate(row["seeds"].values()):
            label = row["family"] if i == 0 else None
            style = {"color": colours[row["family"]], "linewidth": 1, "alpha": 1 if i == 0 else 0.4}
            marker = "o" if len(cell["curve"]) < 3 else None
            axis.plot(*zip(*cell["curve"], strict=True), label=label, marker=marker, **style)
    # The first steep tenth would press all that differs to the bottom.
    points = [point for row in rows for cell in row["seeds"].values() for point in cell["curve"]]
    losses = [loss for tokens, loss in points if 10 * tokens >= points[-1][0]]
    axis.set_ylim(min(losses) - 0.1, max(losses) + 0.1)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set(xlabel="tokens read", ylabel="training loss, nats per token")
    axis.set_title("training", fontsize=10)
    axis.grid(alpha=0.3)


def _draw_lengths(axis: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    lengths = [int(length) for length in rows[0]["perplexity"]["parallel"]]
    for row in rows:
        parallel = row["perplexity"]["parallel"]
        base = next(iter(parallel.values()))
        axis.plot(lengths, [v / base for v in parallel.values()], "o-", color=colours[row["family"]])
        if row["perplexity"]["forms"]:
            last = row["perplexity"]["forms"][-1]["ppl"].values()
            style = {"markerfacecolor": "none", "markersize": 9, "linestyle": ":"}
            axis.plot(lengths, [v / base for v in last], "s", color=colours[row["family"]], **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    if axis.get_ylim()[1] > 2:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="length in tokens", ylabel="perplexity over that at the training length")
    axis.set_title("past the training length: parallel (dots), recurrent (squares)", fontsize=10)
    axis.grid(alpha=0.3)


def _draw_time(
    axis: Any, rows: Sequence[dict[str, Any]], contexts: Sequence[int], colours: dict[str, str]
) -> None:
    timed = [row for row in rows if row["decoding"] is not None]
    width = 0.8 / len(contexts)
    top = 0.0
    for place, row in enumerate(timed):
        for i, context in enumerate(contexts):
            cell = row["decoding"][str(context)]
            x = place + (i - (len(contexts) - 1) / 2) * width
            height = 1e3 * cell["seconds_per_token"]
            top = max(top, height)
            axis.bar(x, height, 0.92 * width, color=colours[row["family"]], alpha=0.45 + 0.55 * (i > 0))
            text = f"{context:,}\n{_size(cell['state_bytes'])}"
            axis.annotate(text, (x, height), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(timed)), [row["family"] for row in timed])
    axis.set_ylim(0, 1.22 * top)
    axis.set_ylabel("ms per token")
    axis.set_title("decoding after a context: its tokens and the state's size", fontsize=10)
    axis.grid(alpha=0.3, axis="y")


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"
