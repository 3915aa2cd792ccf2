"""Tables of the experiment on the frequency-domain TNN."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from experiments.experiment import Row
from experiments.ski_report import BASE, mean_bits, speedups, trained

SHOWN = ("4", "16", "64", "256", "512", "1024")
"""lags of the table of decay"""

_TRIED = """\
## What was tried

Speed: giving the spectrum straight to the convolution, as published, in the place of taps. With gradients
equal to 2e-6 the convolution was 2, 0 and 3 % faster at 512, 2,048 and 8,192 tokens, and is not kept: a
causal spectrum is had by way of the taps, so that no transform is saved. The kernel is dear in its network,
not in its decay, and that network is the TNN's.

Quality: with twice the channels, 150 steps, one seed: TNN 1.836 bits per byte, TNN of decay 0.9 1.713, FD-TNN
1.739 (GELU of the cosine) and 1.723 (ReLU of the frequency, as in the authors' code)."""


def tables(rows: list[Row]) -> str:
    """Quality, speed, decay, conversions."""
    parts = (_quality_table, _speed_table, _decay_table, _conversion_table)
    shown = [part(rows) for part in parts]
    if any(row.get("size") == "small" for row in rows):
        shown.append(_TRIED)
    return "\n\n".join(shown)


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    shown = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


def _quality_table(rows: list[Row]) -> str:
    lines = []
    for name, own in trained(rows).items():
        seeds = ", ".join(f"{row['bits_per_byte']:.4f}" for row in own)
        speed = statistics.mean(row["tokens_per_second"] for row in own)
        ppl = [f"{value:.2f}" for value in own[0]["ppl"].values()]
        lines.append([name, f"{own[0]['params']:,}", f"{mean_bits(own):.4f}", seeds, f"{speed:,.0f}", *ppl])
    lengths = [f"ppl at {int(length):,}" for length in next(row for row in rows if "ppl" in row)["ppl"]]
    head = ["kernel", "parameters", "bits per byte", "of each seed", "tokens/s", *lengths]
    return (
        "## Quality\n\nPerplexities are the first seed's, in parallel. Untrained, a TNN's kernels are as "
        "long as their decay, the frequency-domain ones a few lags: the fewer the steps, the more that "
        "weighs.\n\n" + _table(head, lines)
    )


def _speed_table(rows: list[Row]) -> str:
    lines = []
    for row in (row for row in rows if row["kind"] == "time"):
        steps, alone = speedups(row, "step_seconds"), speedups(row, "kernel_seconds")
        speed = row["tokens"] / statistics.median(row["step_seconds"][BASE])
        kernel = 1e3 * statistics.median(row["kernel_seconds"][BASE])
        shown = [f"{found[name]:.2f}" for found in (steps, alone) for name in found]
        lines.append([f"{row['length']:,}", f"{speed:,.0f}", *shown[:2], f"{kernel:.1f} ms", *shown[2:]])
    head = ["tokens a row", "TNN tokens/s", "fd gelu", "fd relu", "TNN's kernel", "fd gelu", "fd relu"]
    return (
        "## Speed\n\nForward and backward of a whole model, and of one layer's kernel: how many times as "
        "fast as the TNN, medians over turns of all models. A causal spectrum saves no transform: its "
        "imaginary part takes one to the taps and one back, where the TNN's taps take one. Here the first "
        "is of the encoder's features, not of all channels.\n\n" + _table(head, lines)
    )


def _decay_table(rows: list[Row]) -> str:
    lines = []
    for row in (row for row in rows if row["kind"] == "decay"):
        what = f"{row['activation']} of the {row['input']}, {'normalised' if row['norm'] else 'plain'}"
        lines.append([f"untrained: {what}", *_shares(row["tails"])])
    for name, own in trained(rows).items():
        tails = own[0]["tails"]
        worst = {lag: max(layer[lag] for layer in tails) for lag in tails[0]}
        lines.append([f"trained: {name}, worst layer", *_shares(worst)])
    text = "## Decay\n\nShare of a kernel's norm past lag 0 that lies at this lag or later.\n\n"
    return text + _table(["kernel", *SHOWN], lines)


def _shares(tails: dict[str, float]) -> list[str]:
    return [f"{tails[lag]:.1e}" if lag in tails else "-" for lag in SHOWN]


def _conversion_table(rows: list[Row]) -> str:
    lines = []
    for name, own in trained(rows).items():
        for method, found in own[0]["conversions"].items():
            if "refused" in found:
                lines.append([name, method, "refused", *["-"] * 4])
                continue
            orders = ", ".join(map(str, found["orders"]))
            gaps = " / ".join(f"{gap:+.0e}" for gap in found["gaps"].values())
            errors = [f"{found[key]:.0e}" for key in ("tap_error", "l1_error")]
            lines.append([name, method, orders, f"{found['state_bytes']:,}", *errors, gaps])
    head = ["kernel", "method", "orders", "state, bytes", "tap error", "l1 error", "perplexity gap, at 1 / 8"]
    return (
        "## Conversion\n\nThe first seed's models; gaps at one and at eight training lengths.\n\n"
        + _table(head, lines)
    )
