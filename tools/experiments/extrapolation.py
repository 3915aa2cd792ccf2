"""Perplexity far past the training length, of TNN and of Transformers (TNN paper, arXiv 2305.04749)."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from experiments.frame import (
    Claim,
    Declarations,
    Experiment,
    Files,
    Record,
    Section,
    grouped,
    mean_of,
    select,
)
from experiments.report import Panel, Table, line
from experiments.sizing import text_models
from experiments.training import perplexities, recurrent_forms, train_family
from tnnlm.models.causal_lm import CausalLM

_MULTIPLES = (1, 2, 4, 7, 14, 28)
"""Row lengths in training lengths, each a divisor of the last: 512 .. 14,336 tokens."""
TEXTS = Declarations("extrapolation")
MODELS: dict[str, str] = TEXTS.named("models")


def _grid(size: str) -> list[Record]:
    sizes = TEXTS.sizes(size)
    return [
        {"model": model, "seed": seed, "size": size, "steps": sizes["steps"]}
        for seed in sizes["seeds"]
        for model in MODELS
    ]


def _measure(cell: Record, data: Files) -> Record:
    """Train a model and score it on the same held-out tokens in rows of every length."""
    models = text_models(tuple(MODELS), cell["size"], cell["steps"], data)
    family = models.families[cell["model"]]
    model, trained = train_family(family, models.rows, cell["seed"])
    forms = recurrent_forms(model, family.config.conversion) if isinstance(model, CausalLM) else {}
    tokens, ppl = perplexities(
        model, forms, models.corpus, family.config, TEXTS.sizes(cell["size"])["tokens"], _MULTIPLES
    )
    return {
        "params": family.params,
        "lr": family.config.optim.lr,
        "tokens_trained": trained["tokens"],
        "seconds": trained["seconds"],
        "tokens": tokens,
        "ppl": ppl,
    }


def _lengths(records: list[Record]) -> list[int]:
    return [int(length) for length in records[0]["ppl"]["parallel"]]


def _rises(records: list[Record], model: str, form: str = "parallel") -> list[float]:
    """Return the relative rise of perplexity over that at the training length, by length, mean over seeds."""
    own = [list(record["ppl"][form].values()) for record in select(records, model=model)]
    return [fmean(rises) for rises in zip(*([x / ppl[0] - 1 for x in ppl] for ppl in own), strict=True)]


def _claims(records: list[Record]) -> Iterator[Claim]:
    lengths = _lengths(records)
    trained, following, longest = lengths[0], lengths[1], lengths[-1]
    for form in records[0]["ppl"]:
        rises = _rises(records, "tnn", form)
        shown = {"form": form, "last": rises[-1], "most": max(*rises, 0)}
        yield TEXTS.claim("flat", trained=trained, longest=longest, **shown)
    gap = max(
        abs(ppl / record["ppl"]["parallel"][length] - 1)
        for record in records
        for form in record["ppl"].values()
        for length, ppl in form.items()
    )
    yield TEXTS.claim("equal", gap=gap)
    for model in ("gpt2", "transformer"):
        rises = _rises(records, model)
        shown = {"model": MODELS[model], "far": rises[-1], "near": rises[1]}
        yield TEXTS.claim("rises", longest=longest, next=following, **shown)


def _tables(records: list[Record]) -> Iterator[Table]:
    items = []
    for model, own in grouped(records, "model").items():
        for form in own[0]["ppl"]:
            ppl = [record["ppl"][form] for record in own]
            shown = {f"{int(n):,}": f"{mean_of(ppl, n):.2f}" for n in ppl[0]}
            items.append({"model": MODELS[model], "evaluation": form} | shown)
    params = ", ".join(
        f"{MODELS[record['model']]}: {record['params']:,} (learning rate {record['lr']:g})"
        for record in select(records, seed=records[0]["seed"])
    )
    yield TEXTS.table("perplexity", items, **records[0], sizes=params, trained=_lengths(records)[0])


def _panels(records: list[Record]) -> Iterator[Panel]:
    """Plot the rise of perplexity over that at the training length, against length."""
    lengths, form = _lengths(records), list(records[0]["ppl"])[-1]
    percent = {model: [100 * rise for rise in _rises(records, model)] for model in MODELS}
    lines = [line(MODELS[model], zip(lengths, rises, strict=True), model) for model, rises in percent.items()]
    last = [(n, 100 * rise) for n, rise in zip(lengths, _rises(records, "tnn", form), strict=True)]
    lines.append(line("TNN, converted", last, color="black", marker="x", linestyle=":"))
    yield TEXTS.panel("rise", lines, {"trained": lengths[0]}, ticks={n: f"{n:,}" for n in lengths})


_SECTION = Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels)
EXTRAPOLATION = Experiment(sections=(_SECTION,), **TEXTS.named("experiment"))
