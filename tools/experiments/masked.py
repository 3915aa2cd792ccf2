"""Hidden tokens: a two-sided TNN, the same with causal kernels, and a BERT of equal parameters.

Trained by one plain loop on the same rows in the same order with the same tokens hidden, and scored on
the same hidden tokens at every length.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from experiments import masked_report
from experiments.experiment import Row, Verdict
from experiments.frame import CONFIGS
from experiments.part import Part
from experiments.peers import Bert, RotaryBert
from experiments.sizing import SIZE_TOLERANCE, match_width, n_params, text_words
from experiments.training import train_plain
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.data.masking import MaskedRows
from tnnlm.data.tasks import TaskData, open_data
from tnnlm.errors import UserError
from tnnlm.evaluation import add, masked_nll
from tnnlm.models.batches import MaskedBatch
from tnnlm.models.encoders import MaskedLM

MODELS = ("two-sided", "causal", "bert", "rotary bert")
MULTIPLES = (1, 2, 4)
"""lengths to score at, in training lengths"""
_FILES = {"tiny": "tnn_masked_demo", "small": "tnn_masked_demo", "paper": "tnn_masked_wt103"}
_WORDS = {
    "tiny": (
        *("model.d_model=32", "model.n_layers=1", "model.vocab_size=300", "model.max_length=32"),
        *("model.kernel.decay=0.85", "optim.lr=1e-2", "optim.warmup_steps=20", "trainer.max_steps=200"),
        *("data.val_fraction=0.1", "trainer.precision=32-true", "trainer.accelerator=cpu"),
    ),
    "small": ("trainer.max_steps=600",),
    "paper": (),
}
_BERTS = {"bert": Bert, "rotary bert": RotaryBert}
_BERT_LR = {
    "tiny": {"bert": 3e-3, "rotary bert": 3e-3},
    "small": {"bert": 1e-3, "rotary bert": 4e-3},
    "paper": {"bert": 5e-4, "rotary bert": 5e-4},
}
"""small: the better of 1e-3 and 3e-3, and of 1e-3 and 4e-3"""
_TOKENS = {"tiny": 1 << 13, "small": 1 << 17, "paper": 1 << 18}
"""held-out, of which the hidden ones are scored"""
_PASS_TOKENS = 1 << 13


class Masked(Part):
    """Masked-token perplexity."""

    name = "masked"
    panels = 2

    def cells(self, size: str) -> list[Row]:
        """Every model on every seed."""
        return [{"model": model, "seed": seed, "size": size} for seed in (0,) for model in MODELS]

    def measure(self, cell: Row, data: tuple[str, ...]) -> Row:
        """Train one, and score it."""
        config, rows = masked_text(cell["size"], data)
        config = model_settings(cell["model"], cell["size"], config)
        torch.manual_seed(cell["seed"])
        model = build(cell["model"], config.model)
        name = f"{cell['model']}, {n_params(model):,} parameters"
        trained = train_plain(name, model, config, rows.train, cell["seed"], _loss, numbered=True)
        held_out = held_out_rows(rows, _TOKENS[cell["size"]])
        return {
            "params": n_params(model),
            "lr": config.optim.lr,
            "seconds": trained["seconds"],
            "tokens_trained": trained["tokens"],
            "tokens": held_out.targets.numel(),
            "curve": trained["curve"],
            "ppl": perplexities(model.eval(), cell["model"], held_out),
        }

    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """See :mod:`experiments.masked_report`."""
        return masked_report.verdicts(rows)

    def tables(self, rows: list[Row]) -> str:
        """Perplexity by model and length."""
        return masked_report.tables(rows)

    def draw(self, axes: list[Any], rows: list[Row]) -> None:
        """Loss while training, and perplexity against length."""
        masked_report.draw(axes, rows)


@functools.cache
def masked_text(size: str, data: tuple[str, ...]) -> tuple[Config, TaskData]:
    """Settings of a size, and its text with hidden tokens."""
    words = list(_WORDS[size])
    if size == "tiny" and not data:
        from pydoc_data import topics

        data = (topics.__file__,)
    words += text_words(data)
    config = load_config(CONFIGS / f"{_FILES[size]}.yaml", words)
    return config, open_data(config)


def model_settings(model: str, size: str, config: Config) -> Config:
    """A configuration of one of ``MODELS``, with as many parameters as the two-sided TNN of ``config``.

    Raises:
        UserError: if no width brings them near.
    """
    words = [] if model not in _BERTS else [f"optim.lr={_BERT_LR[size][model]}"]
    own = load_config(CONFIGS / f"{_FILES[size]}.yaml", [*_WORDS[size], *words])
    own.data = config.data
    if model == "causal":
        own.model.causal = True
    if model not in _BERTS:
        return own
    with torch.device("meta"):
        target = n_params(build("two-sided", config.model))

    def count(width: int) -> int:
        own.model.glu_dim = width
        with torch.device("meta"):
            return n_params(build(model, own.model))

    own.model.glu_dim = match_width(count, target)
    if abs(count(own.model.glu_dim) - target) > SIZE_TOLERANCE * target:
        raise UserError(f"no width of a BERT brings its parameters within {SIZE_TOLERANCE:.0%} of {target:,}")
    return own


def build(model: str, config: ModelConfig) -> Bert | MaskedLM:
    """One of ``MODELS``, untrained."""
    return _BERTS[model](config) if model in _BERTS else MaskedLM(config)


def _loss(model: nn.Module, batch: MaskedBatch) -> torch.Tensor:
    assert isinstance(model, Bert | MaskedLM)
    return model.loss(batch)


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
        size = max(1, _PASS_TOKENS // (multiple * length))
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
