"""Perplexity far past the training length: TNN beside Transformers (TNN paper, arXiv 2305.04749)."""

from __future__ import annotations

from statistics import fmean

from experiments.frame import Claim, Declarations, Experiment, Files, Record, Section, select
from experiments.report import Column, Panel, Table, line
from experiments.scoring import perplexities, recurrent_forms
from experiments.sizing import text_models
from experiments.training import train_family
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
TEXTS = Declarations("extrapolation")


def _grid(size: str) -> list[Record]:
    sizes = TEXTS.sizes(size)
    return [
        {"model": model, "seed": seed, "size": size, "steps": sizes["steps"]}
        for seed in sizes["seeds"]
        for model in MODELS
    ]


def _measure(cell: Record, data: Files) -> Record:
    """Train one, and score it on the same held-out tokens in rows of every length."""
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


def _forms(records: list[Record]) -> list[str]:
    return list(select(records, model="tnn")[0]["ppl"])


def _rise(records: list[Record], model: str, form: str, length: int) -> float:
    """Of perplexity over that at the training length, relative, mean over the seeds."""
    own = [record["ppl"][form] for record in select(records, model=model)]
    return fmean(ppl[str(length)] / ppl[str(_lengths(records)[0])] - 1 for ppl in own)


def _claims(records: list[Record]) -> list[Claim]:
    """Flat or not, both forms."""
    trained, *longer = lengths = _lengths(records)
    found = []
    for form in _forms(records):
        rises = [_rise(records, "tnn", form, length) for length in lengths]
        shown = {"form": form, "last": rises[-1], "most": max(*rises, 0), "trained": trained}
        found.append(TEXTS.claim("flat", max(rises) <= FLAT, longest=longer[-1], **shown))
    gap = max(
        abs(ppl / record["ppl"]["parallel"][length] - 1)
        for record in records
        for form in record["ppl"].values()
        for length, ppl in form.items()
    )
    found.append(TEXTS.claim("equal", gap <= PARITY, gap=gap))
    for model in ("gpt2", "transformer"):
        far, near = (_rise(records, model, "parallel", length) for length in (longer[-1], longer[0]))
        shown = {"far": far, "near": near, "longest": longer[-1], "next": longer[0]}
        found.append(TEXTS.claim("rises", far > FLAT, model=MODELS[model], **shown))
    return found


def _tables(records: list[Record]) -> list[Table]:
    """Perplexity by model, form and length, means over the seeds."""
    lengths = _lengths(records)
    rows = [(model, form) for model in MODELS for form in select(records, model=model)[0]["ppl"]]

    def mean(length: int) -> Column:
        def shown(row: tuple[str, str]) -> str:
            own = select(records, model=row[0])
            return f"{fmean(record['ppl'][row[1]][str(length)] for record in own):.2f}"

        return shown

    params = ", ".join(
        f"{MODELS[record['model']]}: {record['params']:,} (learning rate {record['lr']:g})"
        for record in select(records, seed=records[0]["seed"])
    )
    note = TEXTS.text("about", **records[0], sizes=params, trained=lengths[0])
    columns: dict[str, Column] = {"model": lambda row: MODELS[row[0]], "form": lambda row: row[1]}
    columns |= {f"{length:,}": mean(length) for length in lengths}
    return [Table("## Perplexity", columns, rows, after=note)]


def _panels(records: list[Record]) -> list[Panel]:
    """Rise of perplexity over that at the training length, against length."""
    lengths = _lengths(records)

    def rises(model: str, form: str) -> list[tuple[float, float]]:
        return [(length, 100 * _rise(records, model, form, length)) for length in lengths]

    lines = [line(label, rises(model, "parallel"), model) for model, label in MODELS.items()]
    last = rises("tnn", _forms(records)[-1])
    lines.append(line("TNN as a recurrence", last, color="black", marker="x", linestyle=":"))
    return [
        Panel(
            f"Perplexity past {lengths[0]:,} tokens, the training length",
            lines,
            axes={"xlabel": "tokens in a row", "ylabel": "rise of perplexity in per cent", "xscale": "log"},
            ticks={length: f"{length:,}" for length in lengths},
        )
    ]


EXTRAPOLATION = Experiment(
    name="extrapolation",
    title="Perplexity past the training length",
    sections=(Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels),),
    panel_size=(7, 4),
)
