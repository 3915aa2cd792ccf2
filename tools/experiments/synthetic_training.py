"""One model trained on a synthetic task in its parallel form, and tested in both forms."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.experiment import Row
from experiments.synthetic_models import Model, answers, answers_by_steps, build_model, convert_by_family
from experiments.synthetic_tasks import Batch, copying, delay
from tnnlm.config.schema import OptimConfig
from tnnlm.errors import UserError
from tnnlm.training.optim import build_optimizer, build_scheduler

_TEST = 1 << 20
"""added to the seed for the test set"""
_TEST_ROWS = 64
"""read at a time: the states of all are held"""


def measure_task(cell: Row) -> Row:
    """Train, convert and test the model that a cell of the experiment names, on a GPU where there is one.

    Returns:
        ``seconds_per_step`` of the training, ``score`` and ``score_recurrent`` (share of symbols told
        right; for delay the RMSE of all outputs), ``chance`` (what a model without memory gets),
        ``difference`` of the forms' outputs, relative, ``method``, ``order`` (real state numbers per
        channel), ``largest_pole``, and ``refused``: what conversions tried before said. Without the
        recurrent form's figures if there is none.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(cell).to(device)
    seconds = train(model, cell)
    model.eval()
    measured: Row = {"seconds_per_step": seconds}
    try:
        made = convert_by_family(model, cell["family"], cell["length"])
    except UserError as error:
        return measured | _test(cell, model, None) | {"refused": str(error)}
    params = [layer.params for layer in made.layers]
    return (
        measured
        | _test(cell, model, made.model)
        | {
            "method": made.layers[0].method,
            "order": max(p.order() for p in params),
            "largest_pole": max(p.largest_pole() for p in params),
            "refused": made.refused,
        }
    )


def train(model: Model, cell: Row) -> float:
    """Train in place on batches of the cell's seed; returns seconds per step."""
    config = OptimConfig(
        lr=cell["lr"],
        kernel_lr_scale=cell["kernel_lr_scale"],
        weight_decay=0.0,
        warmup_steps=min(20, cell["steps"]),
    )
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, cell["steps"])
    device = next(model.parameters()).device
    started, what = time.perf_counter(), f"{cell['task']}, {cell['family']}"
    for step in tqdm(range(cell["steps"]), desc=what, leave=False, disable=None):
        batch = draw(cell, cell["seed"], step, cell["batch"])
        outputs = model(batch.inputs.to(device))[:, -batch.targets.shape[1] :]
        loss = _loss(cell, outputs, batch.targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        scheduler.step()
    return (time.perf_counter() - started) / cell["steps"]


def draw(cell: Row, seed: int, batch: int, rows: int) -> Batch:
    """A batch of the cell's task."""
    if cell["task"] == "copying":
        blanks = cell["length"] - 2 * cell["lag"]
        return copying(
            seed, batch, rows=rows, symbols=cell["lag"], vocab_size=cell["vocab_size"], blanks=blanks
        )
    return delay(seed, batch, rows=rows, length=cell["length"], lag=cell["lag"])


def _loss(cell: Row, outputs: Tensor, targets: Tensor) -> Tensor:
    if cell["task"] == "copying":
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return nn.functional.mse_loss(outputs, targets)


def _test_batches(cell: Row) -> Iterator[Batch]:
    """The test set, the same for every model of a task."""
    left, number = cell["test_rows"], 0
    while left > 0:
        yield draw(cell, _TEST, number, min(left, _TEST_ROWS))
        left, number = left - _TEST_ROWS, number + 1


def _test(cell: Row, model: Model, converted: Model | None) -> Row:
    """Both forms' scores, what knowing nothing scores, and how far the forms are apart."""
    device = next(model.parameters()).device
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in _test_batches(cell):
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        outputs = answers(model, inputs, targets.shape[1])
        sums["count"] += targets.numel()
        sums["score"] += _points(cell, outputs, targets)
        sums["chance"] += _points(cell, torch.zeros_like(outputs), targets)
        if converted is not None:
            again = answers_by_steps(converted, inputs, targets.shape[1])
            sums["score_recurrent"] += _points(cell, again, targets)
            sums["apart"] += float((again - outputs).double().square().sum())
            sums["size"] += float(outputs.double().square().sum())
    count = sums.pop("count")
    apart, size = sums.pop("apart", 0.0), sums.pop("size", 0.0)
    means = {name: value / count for name, value in sums.items()}
    if cell["task"] == "copying":
        means["chance"] = 1 / (cell["vocab_size"] - 2)
    else:
        means = {name: value**0.5 for name, value in means.items()}
    return means if converted is None else means | {"difference": (apart / size) ** 0.5}


def _points(cell: Row, outputs: Tensor, targets: Tensor) -> float:
    """How many symbols are right; of a signal, the sum of squared errors."""
    if cell["task"] == "copying":
        return float((outputs.argmax(-1) == targets).sum())
    return float((outputs - targets).double().square().sum())
