"""ListOps: bidirectional TNN, SGConv and RTF, a Transformer with equal parameters, and a bag of symbols.

All models use the recipe of the TNN paper for ListOps (configs/lra/listops.yaml), at size small with shorter
expressions and fewer steps. They are trained on the same rows in the same order and scored on the test split.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from experiments.frame import Claim, Declarations, Files, Record, Section, select
from experiments.peers import BertClassifier
from experiments.report import PALETTE, Line, Panel, Table, line
from experiments.sizing import match_parameters, n_params
from experiments.training import device_of, train_plain
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.data.sequences.prepare import prepare_sequences
from tnnlm.data.sequences.rows import LabelledCorpus, LabelledRows
from tnnlm.models.encoders import SequenceClassifier
from tnnlm.training.test_split import score_rows

TEXTS = Declarations("listops")
LABELS: dict[str, str] = TEXTS.named("models")
MODELS = tuple(LABELS)
KERNELS: dict[str, list[str]] = TEXTS.named("kernels")
"""Settings of the kernels, by family."""
PUBLISHED: dict[str, float] = TEXTS.named("published")
COMMONEST = "majority class"
PAPER_LENGTH = 1999
SYMBOLS = 15


class BagOfSymbols(nn.Module):
    """Linear classifier on the counts of the symbols, the best model without their order."""

    def __init__(self, n_symbols: int, n_classes: int) -> None:
        super().__init__()
        self.n_symbols = n_symbols
        self.head = nn.Linear(n_symbols, n_classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return logits (B, C) of tokens (B, L), ignoring padding."""
        counts = nn.functional.one_hot(tokens, self.n_symbols + 1)[:, :, 1:].sum(1)
        logits: Tensor = self.head(counts.to(self.head.weight.dtype))
        return logits

    def fit(self, rows: LabelledRows, steps: int = 200) -> None:
        """Minimise the cross-entropy over all rows by L-BFGS."""
        symbols = (torch.from_numpy(rows.symbols(i)[: rows.length].astype("int64")) for i in range(len(rows)))
        counts = torch.stack([torch.bincount(row, minlength=self.n_symbols).float() for row in symbols])
        labels = torch.from_numpy(rows.labels).long()
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.head(counts), labels)
            loss.backward()
            return loss.item()

        optimizer.step(closure)


def _grid(size: str) -> list[Record]:
    return [{"part": "listops", "model": model, "seed": 0, "size": size} for model in MODELS]


def _measure(cell: Record, data: Files) -> Record:
    """Train a model and score it on the test split; ``data`` is ignored."""
    config = model_settings(cell["model"], cell["size"])
    config.seed = cell["seed"]
    corpus, length = prepare_sequences(config), config.model.max_length
    test = corpus.split("test", length)
    torch.manual_seed(cell["seed"])
    model = build(cell["model"], config.model)
    trained = _train(cell, model, config, corpus)
    device = device_of(config)
    scores = score_rows(model.to(device), test, config.data.batch_size, device)
    return {
        **trained,
        "params": n_params(model),
        "accuracy": scores.accuracy,
        "loss": scores.mean,
        "rows": len(test),
        "majority": test.majority,
        "longest": config.data.listops.max_length,
        "max_depth": config.data.listops.max_depth,
    }


def _train(cell: Record, model: nn.Module, config: Config, corpus: LabelledCorpus) -> Record:
    rows = corpus.split("train", config.model.max_length)
    if isinstance(model, BagOfSymbols):
        model.fit(rows)
        return {"curve": []}
    name = f"{cell['model']}, {n_params(model):,} parameters"
    trained = train_plain(name, model, config, rows, cell["seed"], SequenceClassifier.loss)
    own = {"lr": config.optim.lr, "batch_size": config.data.batch_size}
    return {key: trained[key] for key in ("steps", "seconds", "curve")} | own


def model_settings(model: str, size: str) -> Config:
    """Return the configuration of one of ``MODELS``, with as many parameters as the TNN. Position embeddings
    do not count: at length 2,000 they are larger than the rest of the model.

    Raises:
        UserError: If no ``glu_dim`` matches the number of parameters.
    """
    config = TEXTS.config(size, [*KERNELS.get(model, ()), *TEXTS.sizes(size)["words"].get(model, ())])
    if model not in ("tnn", "bag"):
        tnn = partial(build, "tnn", model_settings("tnn", size).model)
        match_parameters(partial(build, model), config.model, tnn, count_without_positions)
    return config


def count_without_positions(model: nn.Module) -> int:
    """Return the number of trainable parameters without position embeddings."""
    return n_params(model) - (model.n_positions if isinstance(model, BertClassifier) else 0)


def build(model: str, config: ModelConfig) -> nn.Module:
    """Build one of ``MODELS``, untrained."""
    if model == "bag":
        return BagOfSymbols(SYMBOLS, config.n_classes)
    return BertClassifier(config) if model == "transformer" else SequenceClassifier(config)


def _claims(records: list[Record]) -> Iterator[Claim]:
    own = select(records, part="listops")
    first, percent = own[0], {record["model"]: 100 * record["accuracy"] for record in own}
    families = {name: percent[name] for name in KERNELS}
    worst, best = min(families.values()), max(families.values())
    majority = 100 * first["majority"]
    floor = max(majority, percent["bag"])
    same = first["longest"] == PAPER_LENGTH
    values = first | {
        "families": ", ".join(f"{LABELS[name].split(',')[0]} {x:.2f} %" for name, x in families.items()),
        "percent": percent | {"majority": majority},
        "published": PUBLISHED,
        "other": "" if same else TEXTS.text("other"),
        "below": max(PUBLISHED[name] - x for name, x in families.items()),
        "apart": best - worst,
    }
    yield TEXTS.claim("reached", same, **values)
    yield TEXTS.claim("structure", worst > floor + 3 * _error(floor, first["rows"]), **values)
    yield TEXTS.claim("together", **values)
    yield TEXTS.claim("transformer", worst > percent["transformer"], **values)


def _tables(records: list[Record]) -> Iterator[Table]:
    """Make the table of accuracies and published accuracies; the last row is the majority class."""
    own = select(records, part="listops")
    first = own[0]
    none = dict.fromkeys(("rate", "published", "time"), "-")
    rows: list[Record] = []
    for record in own:
        model, percent = record["model"], 100 * record["accuracy"]
        shown = {"label": LABELS[model], "shown": f"{percent:.2f} ± {_error(percent, record['rows']):.2f}"}
        shown |= {"published": f"{PUBLISHED[model]:.2f} %"} if model in PUBLISHED else {}
        shown |= {"rate": f"{record['lr']:g}", "time": f"{record['seconds']:.0f}"} if "lr" in record else {}
        rows.append(none | {"params": record["params"]} | shown)
    rows.append(none | {"label": COMMONEST, "params": 0, "shown": f"{100 * first['majority']:.2f}"})
    yield TEXTS.table("models", rows, **first)


def _panels(records: list[Record]) -> Iterator[Panel]:
    """Plot the training loss and the accuracy, with the majority class as a line."""
    own = select(records, part="listops")
    curves, bars = [], {}
    for record in own:
        model, label = record["model"], LABELS[record["model"]]
        curves.append(line(label, _smooth(record["curve"]), model, marker=None))
        below = label.replace(", ", ",\n").replace(" (", "\n(")
        bars[below] = (100 * record["accuracy"], PALETTE[model])
    yield TEXTS.panel("training", curves)
    level = Line(COMMONEST, y=[100 * own[0]["majority"]], style={"color": "black", "linestyle": ":"})
    yield TEXTS.panel("accuracy", [level], own[0], bars=bars)


def _smooth(points: list[list[float]], width: int = 5) -> list[list[float]]:
    """Return the moving average of ``width`` points."""
    runs = (points[i : i + width] for i in range(len(points) - width + 1))
    return [[sum(column) / width for column in zip(*run, strict=True)] for run in runs] or points


def _error(percent: float, rows: int) -> float:
    """Return the standard error of an accuracy, in percentage points."""
    return float(percent * (100 - percent) / rows) ** 0.5


LISTOPS = Section(grid=_grid, measure=_measure, claims=_claims, tables=_tables, panels=_panels)
