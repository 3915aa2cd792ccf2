"""Times as Markdown and as a picture, from plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tnnlm.files import atomic_file

_X = {
    "decode": "tokens read before",
    "batch": "rows",
    "prefill": "prompt tokens",
    "train": "tokens per row",
}
_DASHES = {"float32": "-", "bfloat16": "--", "int8": ":"}


def table(result: dict[str, Any]) -> str:
    """Milliseconds per token by name and dtype, a column per case; the share of the bandwidth in brackets."""
    rows = result["results"]
    cases = list(dict.fromkeys((row["batch"], row["context"]) for row in rows))
    batches = result["mode"] == "batch"
    head = ["name", "dtype", *(f"batch {b}" if batches else f"{c:,} tokens" for b, c in cases)]
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * len(cases) + "|"]
    for name, dtype in dict.fromkeys((row["name"], row["dtype"]) for row in rows):
        cells = []
        for case in cases:
            found = [
                r for r in rows if (r["name"], r["dtype"], r["batch"], r["context"]) == (name, dtype, *case)
            ]
            cells.append(_cell(found[0], result["mode"]) if found else "-")
        lines.append("| " + " | ".join((name, dtype, *cells)) + " |")
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    """Peak memory in MiB by name, a column per length; and what the convolution takes of our step."""
    rows = result["results"]
    lengths = list(dict.fromkeys(row["context"] for row in rows))
    lines = [
        "| peak MiB | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        "|---" + "|---:" * len(lengths) + "|",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        held = {row["context"]: f"{row['peak_bytes'] / 2**20:,.0f}" for row in rows if row["name"] == name}
        lines.append(f"| {name} | " + " | ".join(held.get(n, "-") for n in lengths) + " |")
    shares = {r["context"]: f"{r['convolution_share']:.0%}" for r in rows if "convolution_share" in r}
    lines.append(
        "| convolution's share of the step | " + " | ".join(shares.get(n, "-") for n in lengths) + " |"
    )
    return "\n".join(lines)


def _cell(row: dict[str, Any], mode: str) -> str:
    if mode == "train":
        return f"{row['tokens_per_second']:,.0f} ({row['flop_share']:.0%})"
    if mode != "decode":
        return f"{row['tokens_per_second']:,.0f}"
    share = f" ({row['bandwidth_share']:.0%})" if "bandwidth_share" in row else ""
    return f"{1e3 * row['seconds_per_token']:.2f}{share}"


def _family(name: str) -> str:
    """What has one colour: llama.cpp's names say the dtype too, which the dashes show."""
    return "llama.cpp" if name.startswith("llama.cpp") else name


def plot(result: dict[str, Any], path: Path) -> None:
    """Time per token against context, tokens per second against batch or prompt length."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    rows, mode = result["results"], result["mode"]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    key = "batch" if mode == "batch" else "context"
    families = dict.fromkeys(_family(row["name"]) for row in rows)
    colours = {family: f"C{index}" for index, family in enumerate(families)}
    for name, dtype in dict.fromkeys((row["name"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["name"], row["dtype"]) == (name, dtype)]
        scale = "seconds_per_token" if mode == "decode" else "tokens_per_second"
        y = [row[scale] * (1e3 if mode == "decode" else 1) for row in own]
        style: dict[str, Any] = {
            "color": colours[_family(name)],
            "linestyle": _DASHES[dtype],
            "marker": "o",
            "markersize": 4,
        }
        axes.plot([row[key] for row in own], y, label=f"{name}, {dtype}", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(
        sorted({row[key] for row in rows}), [f"{row:,}" for row in sorted({r[key] for r in rows})]
    )
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axes.set_xlabel(_X[mode])
    axes.set_ylabel("ms per token" if mode == "decode" else "tokens per second")
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    plt.close(figure)
