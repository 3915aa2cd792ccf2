"""Perplexity far past the training length: TNN beside Transformers (TNN paper, arXiv 2305.04749)."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from experiments.experiment import Experiment, Row, Verdict
from experiments.family_measure import Sizes, forms_of, perplexities
from experiments.family_training import train_family
from experiments.picture import save_picture
from experiments.text_models import text_models
from tnnlm.models.causal_lm import CausalLM

MODELS = {
    "tnn": "TNN",
    "gpt2": "Transformer with learned positions",
    "transformer": "Transformer with rotary positions",
}
FLAT = 0.02
"""rise of perplexity over that at the training length, relative, up to which it counts as flat"""
PARITY = 1e-4
"""relative difference of two forms' perplexities"""
_MULTIPLES = (1, 2, 4, 7, 14, 28)
"""lengths in training lengths, each a divisor of the last: 512 .. 14,336"""
_STEPS = {"tiny": 400, "small": 600, "paper": 0}
_SEEDS = {"tiny": (0,), "small": (0, 1), "paper": (0,)}
_TOKENS = {"tiny": 1 << 10, "small": 1 << 16, "paper": 1 << 18}
_COLOURS = {"tnn": "#08519c", "gpt2": "#fdae6b", "transformer": "#e6550d"}


class Extrapolation(Experiment):
    """Train at one length, score at up to 28 times that."""

    name = "extrapolation"
    title = "Perplexity past the training length"

    def cells(self, size: str) -> list[Row]:
        """Every model on every seed."""
        return [
            {"model": model, "seed": seed, "size": size, "steps": _STEPS[size]}
            for seed in _SEEDS[size]
            for model in MODELS
        ]

    def measure(self, cell: Row) -> Row:
        """Train one, and score it on the same held-out tokens in rows of every length."""
        models = text_models(tuple(MODELS), cell["size"], cell["steps"], self.data)
        family = models.families[cell["model"]]
        model, trained = train_family(family, models.rows, cell["seed"])
        forms = forms_of(model, family.config.conversion)[0] if isinstance(model, CausalLM) else []
        sizes = Sizes(tokens=_TOKENS[cell["size"]], multiples=_MULTIPLES)
        found = perplexities(model, forms, models.corpus, family.config, sizes)
        recurrent = {form["form"]: form["ppl"] for form in found["forms"]}
        return {
            "params": family.params,
            "lr": family.config.optim.lr,
            "tokens_trained": trained["tokens"],
            "seconds": trained["seconds"],
            "tokens": found["tokens"],
            "ppl": {"parallel": found["parallel"], **recurrent},
        }

    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """Flat or not, both forms."""
        trained, *longer = _lengths(rows)
        longest = longer[-1]
        found = [
            _flat(
                rows, form, f"perplexity of TNN is flat from {trained:,} to {longest:,} tokens, {form} form"
            )
            for form in _forms(rows)
        ]
        gap = max(
            abs(row["ppl"][form][str(length)] / row["ppl"]["parallel"][str(length)] - 1)
            for row in rows
            for form in row["ppl"]
            for length in _lengths(rows)
        )
        found.append(
            Verdict(
                "the recurrent form has the parallel form's perplexity at every length",
                "equal (ETSC paper)",
                f"largest relative difference {gap:.1e}",
                gap <= PARITY,
            )
        )
        for model in ("gpt2", "transformer"):
            rise = _rise(rows, model, "parallel", longest)
            found.append(
                Verdict(
                    f"perplexity of a {MODELS[model]} rises past the training length",
                    "rises (ALiBi paper, arXiv 2108.12409)",
                    f"{rise:+.1%} at {longest:,}; {_rise(rows, model, 'parallel', longer[0]):+.1%} at "
                    f"{longer[0]:,}",
                    rise > FLAT,
                )
            )
        return found

    def tables(self, rows: list[Row]) -> str:
        """Perplexity by model, form and length, means over the seeds."""
        lengths = _lengths(rows)
        lines = [
            f"| model | form | {' | '.join(f'{length:,}' for length in lengths)} |",
            "|---|---|" + "---:|" * len(lengths),
        ]
        for model, label in MODELS.items():
            own = [row for row in rows if row["model"] == model]
            for form in own[0]["ppl"]:
                values = [fmean(row["ppl"][form][str(length)] for row in own) for length in lengths]
                lines.append(f"| {label} | {form} | {' | '.join(f'{value:.2f}' for value in values)} |")
        params = ", ".join(
            f"{MODELS[row['model']]}: {row['params']:,} (learning rate {row['lr']:g})"
            for row in rows
            if row["seed"] == rows[0]["seed"]
        )
        return (
            "## Perplexity\n\n"
            + "\n".join(lines)
            + f"\n\nMeans over the seeds, on the same {rows[0]['tokens']:,} held-out tokens at every length; "
            f"trained at {lengths[0]:,} on {rows[0]['tokens_trained']:,} tokens each, the same in the same "
            f"order. Parameters: {params}. Positions that a learned table never saw have the vectors they "
            "were drawn with. ETSC's horizon and auto's are those of `convert.py`: where the kernel has "
            "died out."
        )

    def plot(self, rows: list[Row], path: Path) -> None:
        """Rise of perplexity over that at the training length, against length."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        lengths = _lengths(rows)
        figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        for model, label in MODELS.items():
            values = [100 * _rise(rows, model, "parallel", length) for length in lengths]
            ax.plot(lengths, values, "o-", color=_COLOURS[model], label=label)
        values = [100 * _rise(rows, "tnn", _forms(rows)[-1], length) for length in lengths]
        ax.plot(lengths, values, "x:", color="black", label="TNN as a recurrence")
        ax.set(xscale="log", xlabel="tokens in a row", ylabel="rise of perplexity in per cent")
        ax.set_title(f"Perplexity past {lengths[0]:,} tokens, the training length")
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
        save_picture(figure, path)


def _lengths(rows: list[Row]) -> list[int]:
    return [int(length) for length in rows[0]["ppl"]["parallel"]]


def _forms(rows: list[Row]) -> list[str]:
    return list(next(row for row in rows if row["model"] == "tnn")["ppl"])


def _rise(rows: list[Row], model: str, form: str, length: int) -> float:
    """Of perplexity over that at the training length, relative, mean over the seeds."""
    own = [row["ppl"][form] for row in rows if row["model"] == model]
    return fmean(ppl[str(length)] / ppl[str(_lengths(rows)[0])] - 1 for ppl in own)


def _flat(rows: list[Row], form: str, claim: str) -> Verdict:
    worst = max(_rise(rows, "tnn", form, length) for length in _lengths(rows))
    last = _rise(rows, "tnn", form, _lengths(rows)[-1])
    return Verdict(
        claim,
        "flat to 14,336 (TNN paper)",
        f"{last:+.1%} at {_lengths(rows)[-1]:,}, largest rise {max(worst, 0):.1%}",
        worst <= FLAT,
    )
