"""Masked language modelling: a bidirectional TNN, one with causal kernels, and BERTs with equal parameters.

All models are trained on the same rows in the same order with the same tokens masked, and scored on the
same masked tokens at every length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

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
from experiments.listops import LISTOPS
from experiments.peers import Bert, RotaryBert
from experiments.report import Panel, Table, line
from experiments.sizing import match_parameters, n_params, text_words
from experiments.training import PASS_TOKENS, train_plain
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.data.masking import MaskedRows
from tnnlm.data.tasks import TaskData, load_task_data
from tnnlm.errors import UserError
from tnnlm.evaluation import add, masked_nll
from tnnlm.models.batches import MaskedBatch
from tnnlm.models.encoders import MaskedLM

MULTIPLES = (1, 2, 4)
"""Row lengths for scoring, in training lengths."""
_BERTS = {"bert": Bert, "rotary bert": RotaryBert}
TEXTS = Declarations("masked")
LABELS: dict[str, str] = TEXTS.named("models")
MODELS = tuple(LABELS)


def _grid(size: str) -> list[Record]:
    return [{"part": "masked", "model": model, "seed": 0, "size": size} for model in MODELS]


def _measure(cell: Record, data: Files) -> Record:
    """Train a model and score it."""
    config, rows = masked_text(cell["size"], data)
    config = model_settings(cell["model"], cell["size"], config)
    torch.manual_seed(cell["seed"])
    model = build(cell["model"], config.model)
    name = f"{cell['model']}, {n_params(model):,} parameters"
    trained = train_plain(name, model, config, rows.train, cell["seed"], masked_loss, resampled=True)
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
    """Return the configuration of a size, and its data with masked tokens."""
    config = TEXTS.config(size, text_words(data))
    return config, load_task_data(config)


def model_settings(model: str, size: str, config: Config) -> Config:
    """Return the configuration of one of ``MODELS``, with as many parameters as the TNN of ``config``.

    Raises:
        UserError: If no ``glu_dim`` matches the number of parameters.
    """
    own = TEXTS.config(size, TEXTS.sizes(size)["words"].get(model, []))
    own.data = config.data
    own.model.causal = model == "causal"
    if model in _BERTS:
        match_parameters(partial(build, model), own.model, partial(build, "two-sided", config.model))
    return own


def masked_loss(model: nn.Module, batch: MaskedBatch) -> Tensor:
    """Return the mean cross-entropy in nats per predicted token, of a baseline or of ``MaskedLM``."""
    logits = model(batch.tokens, batch.positions)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def build(model: str, config: ModelConfig) -> Bert | MaskedLM:
    """Build one of ``MODELS``, untrained."""
    return _BERTS[model](config) if model in _BERTS else MaskedLM(config)


def held_out_rows(data: TaskData, tokens: int) -> MaskedBatch:
    """Return about ``tokens`` held-out tokens in rows (B, L): evenly spaced runs of consecutive rows."""
    rows: MaskedRows = data.val
    together = max(MULTIPLES)
    runs = len(rows) // together
    if not runs:
        raise UserError(f"held-out split: does not fill {together} rows; use more text")
    count = min(runs, max(1, tokens // (together * rows.rows.length)))
    starts = torch.linspace(0, runs - 1, count).round().long() * together
    items = [rows[int(start) + i] for start in starts for i in range(together)]
    return MaskedBatch(*(torch.stack(parts) for parts in zip(*items, strict=True)))


def perplexities(model: nn.Module, name: str, held_out: MaskedBatch) -> dict[str, float]:
    """Return the perplexity of the same masked tokens by row length; only the first length for a BERT."""
    length, device = held_out.tokens.shape[1], next(model.parameters()).device
    found = {}
    for multiple in MULTIPLES[:1] if name == "bert" else MULTIPLES:
        batch = joined(held_out, multiple)
        size = max(1, PASS_TOKENS // (multiple * length))
        parts = zip(*(tensor.to(device).split(size) for tensor in batch), strict=True)
        nll = add([masked_nll(model, MaskedBatch(*part)) for part in parts])  # type: ignore[arg-type]
        found[str(multiple * length)] = nll.ppl
    return found


def joined(batch: MaskedBatch, multiple: int) -> MaskedBatch:
    """Concatenate each ``multiple`` consecutive rows into one."""
    length, count = batch.tokens.shape[1], batch.positions.shape[1]
    offsets = length * torch.arange(multiple).repeat_interleave(count)
    return MaskedBatch(
        batch.tokens.reshape(-1, multiple * length),
        batch.positions.reshape(-1, multiple * count) + offsets,
        batch.targets.reshape(-1, multiple * count),
    )


def _lengths(records: list[Record]) -> list[str]:
    return list(select(records, part="masked", model="two-sided")[0]["ppl"])


def _ppl(own: list[Record]) -> dict[str, float]:
    """Return the perplexity of one model by length, mean over seeds."""
    return {length: fmean(record["ppl"][length] for record in own) for length in own[0]["ppl"]}


def _claims(records: list[Record]) -> Iterator[Claim]:
    trained, *_, longest = _lengths(records)
    models = grouped(select(records, part="masked"), "model")
    each = {model: [record["ppl"] for record in own] for model, own in models.items()}
    ppl = {model: " and ".join(f"{one[trained]:.2f}" for one in own) for model, own in each.items()}
    means = {model: mean_of(own, trained) for model, own in each.items()}
    pairs = zip(each["two-sided"], each["causal"], strict=True)
    yield TEXTS.claim("both_sides", all(one[trained] < other[trained] for one, other in pairs), **ppl)
    yield TEXTS.claim("bert", ratio=means["two-sided"] / min(means[bert] for bert in _BERTS), **ppl)
    rise = max(one[longest] / one[trained] - 1 for one in each["two-sided"])
    yield TEXTS.claim("flat", trained=int(trained), longest=int(longest), rise=rise)


def _tables(records: list[Record]) -> Iterator[Table]:
    lengths, own = _lengths(records), select(records, part="masked")
    items = []
    for model, found in grouped(own, "model").items():
        ppl = _ppl(found)
        shown = {f"{int(n):,}": f"{ppl[n]:.2f}" if n in ppl else "-" for n in lengths}
        seconds = mean_of(found, "seconds")
        items.append(found[0] | {"label": LABELS[model], "mean_seconds": seconds, "*": shown})
    yield TEXTS.table("models", items, **own[0], trained=int(lengths[0]))


def _panels(records: list[Record]) -> Iterator[Panel]:
    """Plot the training loss of the first seed, and perplexity against length, mean over seeds."""
    curves, ppl = [], []
    for model, own in grouped(select(records, part="masked"), "model").items():
        curves.append(line(LABELS[model], own[0]["curve"], model, marker=None))
        points = [(int(n), value) for n, value in _ppl(own).items()]
        ppl.append(line(LABELS[model], points, model))
    yield TEXTS.panel("training", curves)
    yield TEXTS.panel("held_out", ppl, ticks={float(n): f"{int(n):,}" for n in _lengths(records)})


MASKED = Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels)
BIDIRECTIONAL = Experiment(sections=(MASKED, LISTOPS), **TEXTS.named("experiment"))
