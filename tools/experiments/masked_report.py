"""What the masked half of the bidirectional experiment says."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from experiments.experiment import Row, Verdict

LABELS = {
    "two-sided": "TNN, two-sided",
    "causal": "TNN, causal",
    "bert": "BERT",
    "rotary bert": "BERT, rotary positions",
}
MARGIN = 0.05
"""of perplexity, relative, within which two models are equals"""
FLAT = 0.02
"""rise of perplexity over that at the training length, relative, up to which it counts as flat"""
_TRIED = (
    "\n\nThe BERT with learned positions has not left the plateau on which it knows how often a token "
    "comes, but not where: it says little of longer trainings. The one with rotary positions has. Tried: "
    "learning rates of 1e-3 and 3e-3 with learned positions (perplexity 392 at 3e-3 after 200 steps), "
    "1e-3 and 4e-3 with rotary ones (201 and 88 after 300)."
)
_COLOURS = {"two-sided": "#08519c", "causal": "#9ecae1", "bert": "#fdae6b", "rotary bert": "#e6550d"}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What holds and what does not."""
    trained, *_, longest = _lengths(rows)
    two_sided, causal, bert, rotary = (_ppl(rows, model, trained) for model in LABELS)
    rises = [one / other - 1 for one, other in zip(_ppl(rows, "two-sided", longest), two_sided, strict=True)]
    return [
        Verdict(
            "kernels over both sides guess hidden tokens better than causal ones of equal parameters",
            "-",
            f"perplexity {_shown(two_sided)} against {_shown(causal)}",
            all(one < other for one, other in zip(two_sided, causal, strict=True)),
        ),
        Verdict(
            f"a two-sided TNN is at least as good as a BERT of equal parameters, within {MARGIN:.0%}",
            "better than its competitors in most tasks, bidirectional language modelling among them (TNN "
            "paper, abstract)",
            f"perplexity {_shown(two_sided)} against {_shown(bert)}, {_shown(rotary)} with rotary positions",
            fmean(two_sided) <= (1 + MARGIN) * min(fmean(bert), fmean(rotary)),
        ),
        Verdict(
            f"the two-sided TNN's perplexity is flat from {trained:,} to {longest:,} tokens",
            "flat to 14,336 after 512, of the causal model (TNN paper)",
            f"largest rise {max(rises):+.1%}",
            max(rises) <= FLAT,
        ),
    ]


def tables(rows: list[Row]) -> str:
    """Perplexity by model and length, means over the seeds."""
    lengths = _lengths(rows)
    lines = [
        f"| model | parameters | learning rate | {' | '.join(f'{n:,}' for n in lengths)} | seconds |",
        "|---|" + "---:|" * (len(lengths) + 3),
    ]
    for model, label in LABELS.items():
        own = [row for row in rows if row["model"] == model]
        values = [fmean(_ppl(rows, model, n)) if str(n) in own[0]["ppl"] else None for n in lengths]
        shown = " | ".join("-" if value is None else f"{value:.2f}" for value in values)
        seconds = fmean(row["seconds"] for row in own)
        lines.append(f"| {label} | {own[0]['params']:,} | {own[0]['lr']:g} | {shown} | {seconds:.0f} |")
    tried = "" if rows[0]["size"] != "small" else _TRIED
    return (
        "## Hidden tokens\n\nPerplexity of hidden tokens in rows of so many tokens, means over the seeds: "
        f"{rows[0]['tokens']:,} held-out ones, the same at every length and for every model; trained at "
        f"{lengths[0]:,} on {rows[0]['tokens_trained']:,} tokens, the same in the same order. 15 % are to be "
        "guessed, of ten of them 8 hidden, 1 another token, 1 left. A BERT has no positions past those it "
        "was trained with.\n\n" + "\n".join(lines) + tried
    )


def draw(axes: list[Any], rows: list[Row]) -> None:
    """Loss while training, of the first seed; perplexity against length, means over the seeds."""
    curve, length = axes
    for model, label in LABELS.items():
        first = next(row for row in rows if row["model"] == model)
        curve.plot(*zip(*first["curve"], strict=True), color=_COLOURS[model], label=label)
        at = [int(n) for n in first["ppl"]]
        length.plot(at, [fmean(_ppl(rows, model, n)) for n in at], "o-", color=_COLOURS[model], label=label)
    curve.set(xlabel="tokens read", ylabel="nats per hidden token", title="Training")
    length.set(xlabel="tokens in a row", ylabel="perplexity of hidden tokens", title="Held out", xscale="log")
    curve.xaxis.set_major_formatter("{x:,.0f}")
    lengths = _lengths(rows)
    length.set_xticks(lengths, [f"{n:,}" for n in lengths])
    length.minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()


def _lengths(rows: list[Row]) -> list[int]:
    return [int(n) for n in next(row for row in rows if row["model"] == "two-sided")["ppl"]]


def _ppl(rows: list[Row], model: str, length: int) -> list[float]:
    """Of every seed."""
    return [row["ppl"][str(length)] for row in rows if row["model"] == model]


def _shown(values: list[float]) -> str:
    return " and ".join(f"{value:.2f}" for value in values)
