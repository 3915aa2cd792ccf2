"""Perplexity far past the training length: TNN beside Transformers (TNN paper, arXiv 2305.04749)."""

from __future__ import annotations

from statistics import fmean

from experiments.frame import Claim, Experiment, Files, Record, Section, select
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
_STEPS = {"tiny": 400, "small": 600, "paper": 0}
_SEEDS = {"tiny": (0,), "small": (0, 1), "paper": (0,)}
_TOKENS = {"tiny": 1 << 10, "small": 1 << 16, "paper": 1 << 18}


def _grid(size: str) -> list[Record]:
    return [
        {"model": model, "seed": seed, "size": size, "steps": _STEPS[size]}
        for seed in _SEEDS[size]
        for model in MODELS
    ]


def _measure(cell: Record, data: Files) -> Record:
    """Train one, and score it on the same held-out tokens in rows of every length."""
    models = text_models(tuple(MODELS), cell["size"], cell["steps"], data)
    family = models.families[cell["model"]]
    model, trained = train_family(family, models.rows, cell["seed"])
    forms = recurrent_forms(model, family.config.conversion) if isinstance(model, CausalLM) else {}
    tokens, ppl = perplexities(model, forms, models.corpus, family.config, _TOKENS[cell["size"]], _MULTIPLES)
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
        found.append(
            Claim(
                f"perplexity of TNN is flat from {trained:,} to {longer[-1]:,} tokens, {form} form",
                "flat to 14,336 (TNN paper)",
                f"{rises[-1]:+.1%} at {longer[-1]:,}, largest rise {max(*rises, 0):.1%}",
                max(rises) <= FLAT,
            )
        )
    gap = max(
        abs(ppl / record["ppl"]["parallel"][length] - 1)
        for record in records
        for form in record["ppl"].values()
        for length, ppl in form.items()
    )
    found.append(
        Claim(
            "the recurrent form has the parallel form's perplexity at every length",
            "equal (ETSC paper)",
            f"largest relative difference {gap:.1e}",
            gap <= PARITY,
        )
    )
    for model in ("gpt2", "transformer"):
        far, near = (_rise(records, model, "parallel", length) for length in (longer[-1], longer[0]))
        found.append(
            Claim(
                f"perplexity of a {MODELS[model]} rises past the training length",
                "rises (ALiBi paper, arXiv 2108.12409)",
                f"{far:+.1%} at {longer[-1]:,}; {near:+.1%} at {longer[0]:,}",
                far > FLAT,
            )
        )
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
    note = (
        f"Means over the seeds, on the same {records[0]['tokens']:,} held-out tokens at every length; "
        f"trained at {lengths[0]:,} on {records[0]['tokens_trained']:,} tokens each, the same in the same "
        f"order. Parameters: {params}. Positions that a learned table never saw have the vectors they "
        "were drawn with. ETSC's horizon and auto's are those of `convert.py`: where the kernel has "
        "died out."
    )
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
            axes={
                "xlabel": "tokens in a row",
                "ylabel": "rise of perplexity in per cent",
                "xscale": "log",
            },
            ticks={length: f"{length:,}" for length in lengths},
        )
    ]


EXTRAPOLATION = Experiment(
    name="extrapolation",
    title="Perplexity past the training length",
    sections=(Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels),),
    panel_size=(7, 4),
)
