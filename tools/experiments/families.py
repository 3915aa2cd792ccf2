"""Bits per byte of TNN, SGConv, RTF and a Transformer at equal parameters and tokens."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, median, stdev

from experiments.experiment import Experiment, Row, Verdict
from experiments.family_measure import Sizes, held_out_bits
from experiments.family_report import COLOURS
from experiments.family_training import train_family
from experiments.picture import save_picture
from experiments.text_models import text_models

NAMES = {"tnn": "TNN", "sgconv": "SGConv", "rtf": "RTF", "transformer": "Transformer"}
_STEPS = {"tiny": 60, "small": 400, "paper": 0}
_SEEDS = {"tiny": (0,), "small": (0, 1, 2), "paper": (0, 1, 2)}
_VAL_TOKENS = {"tiny": 1 << 10, "small": 1 << 17, "paper": 1 << 18}


class Families(Experiment):
    """Train all on the same tokens in the same order, score all on the same held-out text."""

    name = "families"
    title = "Families at equal parameters and tokens"

    def cells(self, size: str) -> list[Row]:
        """Every family on every seed."""
        return [
            {"family": family, "seed": seed, "size": size, "steps": _STEPS[size]}
            for seed in _SEEDS[size]
            for family in NAMES
        ]

    def measure(self, cell: Row) -> Row:
        """Train one and score it at the training length."""
        models = text_models(tuple(NAMES), cell["size"], cell["steps"], self.data)
        family = models.families[cell["family"]]
        model, trained = train_family(family, models.rows, cell["seed"])
        sizes = Sizes(val_tokens=_VAL_TOKENS[cell["size"]])
        bits = held_out_bits(model, models.corpus, family.config, sizes)
        bytes_per_token = models.corpus.val.bytes_per_token
        return {
            "bits_per_byte": bits,
            "ppl": math.exp(bits * math.log(2) * bytes_per_token),
            "params": family.params,
            "width": family.config.model.glu_dim,
            "lr": family.config.optim.lr,
            **trained,
        }

    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """Who is ahead of whom, by means over the seeds."""
        ours = {name: fmean(_of(rows, name)) for name in NAMES}
        sizes = [row["params"] for row in rows]
        peer = ours["transformer"]
        convolutions = [ours[name] for name in NAMES if name != "transformer"]
        published = {
            "tnn": "24.67 against 24.78 (test perplexity, WikiText-103, TNN paper)",
            "sgconv": "-",
            "rtf": "Hyena-RTF 18.0 against Hyena 18.5 (perplexity, WikiText-103, RTF paper)",
        }
        return [
            *(
                Verdict(
                    f"{NAMES[name]} is at least as good as the Transformer",
                    published[name],
                    f"{ours[name]:.4f} against {peer:.4f} bits per byte ({ours[name] / peer - 1:+.1%})",
                    ours[name] <= peer,
                )
                for name in published
            ),
            Verdict(
                "TNN, SGConv and RTF are within 5 % of each other",
                "-",
                f"{min(convolutions):.4f} to {max(convolutions):.4f} bits per byte",
                max(convolutions) <= 1.05 * min(convolutions),
            ),
            Verdict(
                "parameters are equal to 3 %, and tokens to the last one",
                "-",
                f"{min(sizes):,} to {max(sizes):,} parameters; {rows[0]['tokens']:,} tokens",
                max(sizes) <= 1.03 * min(sizes) and len({row["tokens"] for row in rows}) == 1,
            ),
        ]

    def tables(self, rows: list[Row]) -> str:
        """Quality and speed by family, means over the seeds."""
        lines = [
            "| family | parameters | learning rate | bits per byte | perplexity | training tokens/s |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, label in NAMES.items():
            own = [row for row in rows if row["family"] == name]
            bits = _of(rows, name)
            shown = f"{fmean(bits):.4f}" + (f" ± {stdev(bits):.4f}" if len(bits) > 1 else "")
            ppl, speed = fmean(row["ppl"] for row in own), median(row["tokens_per_second"] for row in own)
            lines.append(
                f"| {label} | {own[0]['params']:,} | {own[0]['lr']:g} | {shown} | {ppl:.2f} | {speed:,.0f} |"
            )
        tried = ", and its learning rate is the best of 1e-3, 2e-3 and 4e-3. docs/families.md has more "
        tried += "channels, a second text, and the cost of decoding"
        return (
            "## Quality\n\n"
            + "\n".join(lines)
            + f"\n\n± standard deviation over the seeds. {rows[0]['tokens']:,} tokens, the same in the same "
            "order for all; parallel form, at the training length. The Transformer has rotary positions"
            + (tried if rows[0]["size"] == "small" else "")
            + "."
        )

    def plot(self, rows: list[Row], path: Path) -> None:
        """Learning curves, and bits per byte of every seed."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for place, (name, label) in enumerate(NAMES.items()):
            own = [row for row in rows if row["family"] == name]
            curves = zip(*(row["curve"] for row in own), strict=True)
            mean = [(points[0][0], fmean(loss for _, loss in points)) for points in curves]
            left.plot(*zip(*mean, strict=True), color=COLOURS[name], label=label)
            bits = _of(rows, name)
            right.plot([place] * len(bits), bits, "o", color=COLOURS[name], alpha=0.6)
            right.plot([place - 0.25, place + 0.25], [fmean(bits)] * 2, color=COLOURS[name])
        left.set(xlabel="tokens read", ylabel="training loss, nats per token", xscale="log")
        left.legend()
        right.set_xticks(range(len(NAMES)), list(NAMES.values()))
        right.set_ylabel("held-out bits per byte")
        for ax in (left, right):
            ax.grid(alpha=0.3)
        save_picture(figure, path)


def _of(rows: list[Row], family: str) -> list[float]:
    return [row["bits_per_byte"] for row in rows if row["family"] == family]
