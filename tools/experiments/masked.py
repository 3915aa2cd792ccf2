"""Hidden tokens: a two-sided TNN, the same with causal kernels, and a BERT of equal parameters.

Trained by one plain loop on the same rows in the same order with the same tokens hidden, and scored on
the same hidden tokens at every length.
"""

from __future__ import annotations

import functools
from functools import partial
from statistics import fmean

import torch
from torch import nn

from experiments.frame import CONFIGS, Claim, Declarations, Files, Record, Section, select
from experiments.peers import Bert, RotaryBert
from experiments.report import Panel, Table, line
from experiments.scoring import PASS_TOKENS
from experiments.sizing import match_parameters, n_params, text_words
from experiments.training import own_loss, train_plain
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.data.masking import MaskedRows
from tnnlm.data.tasks import TaskData, load_task_data
from tnnlm.errors import UserError
from tnnlm.evaluation import add, masked_nll
from tnnlm.models.batches import MaskedBatch
from tnnlm.models.encoders import MaskedLM

LABELS = {
    "two-sided": "TNN, two-sided",
    "causal": "TNN, causal",
    "bert": "BERT",
    "rotary bert": "BERT, rotary positions",
}
MODELS = tuple(LABELS)
MULTIPLES = (1, 2, 4)
"""lengths to score at, in training lengths"""
MARGIN = 0.05
"""of perplexity, relative, within which two models are equals"""
FLAT = 0.02
"""rise of perplexity over that at the training length, relative, up to which it counts as flat"""
_BERTS = {"bert": Bert, "rotary bert": RotaryBert}
TEXTS = Declarations("masked")


def _grid(size: str) -> list[Record]:
    return [{"part": "masked", "model": model, "seed": 0, "size": size} for model in MODELS]


def _measure(cell: Record, data: Files) -> Record:
    """Train one, and score it."""
    config, rows = masked_text(cell["size"], data)
    config = model_settings(cell["model"], cell["size"], config)
    torch.manual_seed(cell["seed"])
    model = build(cell["model"], config.model)
    name = f"{cell['model']}, {n_params(model):,} parameters"
    trained = train_plain(name, model, config, rows.train, cell["seed"], own_loss, resampled=True)
    held_out = held_out_rows(rows, TEXTS.sizes(cell["size"])["tokens"])
    return {
        "params": n_params(model),
        "lr": config.optim.lr,
        "seconds": trained["seconds"],
        "tokens_trained": trained["tokens"],
        "tokens": held_out.targets.numel(),
        "curve": trained["curve"],
        "ppl": perplexities(model.eval(), cell["model"], held_out),
    }


@functools.cache
def masked_text(size: str, data: Files) -> tuple[Config, TaskData]:
    """Settings of a size, and its text with hidden tokens."""
    if size == "tiny" and not data:
        from pydoc_data import topics

        data = (topics.__file__,)
    config = _load(size, text_words(data))
    return config, load_task_data(config)


def _load(size: str, words: list[str]) -> Config:
    sizes = TEXTS.sizes(size)
    return load_config(CONFIGS / f"{sizes['config']}.yaml", [*sizes["settings"], *words])


def model_settings(model: str, size: str, config: Config) -> Config:
    """A configuration of one of ``MODELS``, with as many parameters as the two-sided TNN of ``config``.

    Raises:
        UserError: if no width brings them near.
    """
    rate = TEXTS.sizes(size)["bert_lr"].get(model)
    own = _load(size, [] if rate is None else [f"optim.lr={rate}"])
    own.data = config.data
    own.model.causal = model == "causal"
    if model in _BERTS:
        with torch.device("meta"):
            target = n_params(build("two-sided", config.model))
        match_parameters(partial(build, model), own.model, target)
    return own


def build(model: str, config: ModelConfig) -> Bert | MaskedLM:
    """One of ``MODELS``, untrained."""
    return _BERTS[model](config) if model in _BERTS else MaskedLM(config)


def held_out_rows(data: TaskData, tokens: int) -> MaskedBatch:
    """Runs of as many rows as the longest length takes, evenly spaced: (rows, L), run after run."""
    rows: MaskedRows = data.val
    together = max(MULTIPLES)
    runs = len(rows) // together
    if not runs:
        raise UserError(f"the held-out text doesn't fill {together} rows: give more of it")
    wanted = min(runs, max(1, tokens // (together * rows.rows.length)))
    starts = torch.linspace(0, runs - 1, wanted).round().long() * together
    items = [rows[int(start) + i] for start in starts for i in range(together)]
    return MaskedBatch(*(torch.stack(parts) for parts in zip(*items, strict=True)))


def perplexities(model: nn.Module, name: str, held_out: MaskedBatch) -> dict[str, float]:
    """By length, on the same hidden tokens. A BERT has no positions past the first."""
    length, device = held_out.tokens.shape[1], next(model.parameters()).device
    found = {}
    for multiple in MULTIPLES[:1] if name == "bert" else MULTIPLES:
        batch = joined(held_out, multiple)
        size = max(1, PASS_TOKENS // (multiple * length))
        pieces = zip(*(part.to(device).split(size) for part in batch), strict=True)
        nll = add([masked_nll(model, MaskedBatch(*piece)) for piece in pieces])  # type: ignore[arg-type]
        found[str(multiple * length)] = nll.ppl
    return found


def joined(batch: MaskedBatch, multiple: int) -> MaskedBatch:
    """So many rows after one another as one row."""
    length, count = batch.tokens.shape[1], batch.positions.shape[1]
    offsets = length * torch.arange(multiple).repeat_interleave(count)
    return MaskedBatch(
        batch.tokens.reshape(-1, multiple * length),
        batch.positions.reshape(-1, multiple * count) + offsets,
        batch.targets.reshape(-1, multiple * count),
    )


def _ppl(records: list[Record], model: str, length: str) -> list[float]:
    """Of every seed."""
    return [record["ppl"][length] for record in select(records, part="masked", model=model)]


def _lengths(records: list[Record]) -> list[str]:
    return list(select(records, part="masked", model="two-sided")[0]["ppl"])


def _claims(records: list[Record]) -> list[Claim]:
    trained, *_, longest = _lengths(records)
    two_sided, causal, bert, rotary = (_ppl(records, model, trained) for model in MODELS)
    longer = _ppl(records, "two-sided", longest)
    rise = max(one / other - 1 for one, other in zip(longer, two_sided, strict=True))

    def shown(values: list[float]) -> str:
        return " and ".join(f"{value:.2f}" for value in values)

    names = ("two_sided", "causal", "bert", "rotary")
    ppl = dict(zip(names, map(shown, (two_sided, causal, bert, rotary)), strict=True))
    better = all(one < other for one, other in zip(two_sided, causal, strict=True))
    good = fmean(two_sided) <= (1 + MARGIN) * min(fmean(bert), fmean(rotary))
    return [
        TEXTS.claim("both_sides", better, **ppl),
        TEXTS.claim("bert", good, margin=MARGIN, **ppl),
        TEXTS.claim("flat", rise <= FLAT, trained=int(trained), longest=int(longest), rise=rise),
    ]


def _tables(records: list[Record]) -> list[Table]:
    """Perplexity by model and length, means over the seeds."""
    lengths, own = _lengths(records), select(records, part="masked")
    items = []
    for model, label in LABELS.items():
        found = select(own, model=model)
        item = found[0] | {"label": label, "mean_seconds": fmean(record["seconds"] for record in found)}
        for n in lengths:
            known = n in found[0]["ppl"]
            item[f"{int(n):,}"] = f"{fmean(_ppl(own, model, n)):.2f}" if known else "-"
        items.append(item)
    tried = TEXTS.text("tried") if own[0]["size"] == "small" else ""
    titles = [f"{int(n):,}" for n in lengths]
    return [TEXTS.table("models", items, titles, **own[0], trained=int(lengths[0]), tried=tried)]


def _panels(records: list[Record]) -> list[Panel]:
    """Loss while training, of the first seed; perplexity against length, means over the seeds."""
    curves, ppl = [], []
    for model, label in LABELS.items():
        first = select(records, part="masked", model=model)[0]
        curves.append(line(label, first["curve"], model, marker=None))
        ppl.append(line(label, [(int(n), fmean(_ppl(records, model, n))) for n in first["ppl"]], model))
    length = {"xlabel": "tokens in a row", "ylabel": "perplexity of hidden tokens", "xscale": "log"}
    ticks = {float(n): f"{int(n):,}" for n in _lengths(records)}
    return [
        Panel("Training", curves, axes={"xlabel": "tokens read", "ylabel": "nats per hidden token"}),
        Panel("Held out", ppl, axes=length, ticks=ticks),
    ]


MASKED = Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels)
