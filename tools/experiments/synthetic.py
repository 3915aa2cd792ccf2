"""Memory tasks at growing state sizes: accuracy, cost of training, and accuracy of the converted models.

Copying and Delay of the RTF paper (arXiv 2405.06147), for RTF, TNN and SGConv. Every model is trained in its
parallel form, converted, and tested in both forms; the recurrence processes the test set step by step. Size
small is the published one with lengths, delays and state sizes divided by eight, and fewer steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from experiments.frame import Experiment, Files, Record, Section
from experiments.synthetic_claims import SAYS, TASKS, TEXTS
from experiments.synthetic_tasks import (
    Batch,
    Model,
    answers_by_steps,
    build_model,
    convert_by_family,
    copying,
    delay,
)
from experiments.timing import interleaved, medians, peak_allocated
from experiments.training import device_of, fit
from tnnlm.config.optim import OptimConfig
from tnnlm.errors import UserError
from tnnlm.kernels import RTFConfig, build_kernel
from tnnlm.modules import LongConv

_RTF: Record = {"init": "xavier", "constraint": "montel"}
_TEST = 1 << 20
"""Seed of the test set."""
_TEST_ROWS = 64
"""Rows per test batch, whose states are in memory at the same time."""
_WARM_UP = 2


def _task_grid(task: str, size: str) -> list[Record]:
    """Return a cell per family, state size of RTF and seed."""
    sizes = TEXTS.sizes(size)
    shared = {"task": task} | sizes[task]
    kernels: list[tuple[str, Record]] = [("rtf", {"state_size": n} | _RTF) for n in sizes["states"]]
    kernels += [("tnn", {"decay": sizes["decay"]}), ("sgconv", {})]
    return [
        shared | {"family": name, "seed": seed, "kernel_lr_scale": sizes["kernel_lr"][name]} | kernel
        for seed in sizes["seeds"]
        for name, kernel in kernels
    ]


def _cost_grid(size: str) -> list[Record]:
    return [{"task": "cost", "seed": 0} | TEXTS.sizes(size)["cost"]]


def measure_task(cell: Record, data: Files = ()) -> Record:
    """Train, convert and test the model of a cell, on a GPU if there is one.

    Returns:
        ``seconds_per_step`` of the training, ``score`` and ``score_recurrent`` (fraction of correct symbols;
        RMSE of all outputs for delay), ``chance`` (score without memory), relative ``difference`` of parallel
        and recurrent outputs, ``method``, ``order`` (real state numbers per channel), ``largest_pole``, and
        ``refused``: messages of refused conversions. If all are refused, the recurrent values are missing.
    """
    model = build_model(cell).to(device_of())
    measured: Record = {"seconds_per_step": _train(model, cell)}
    model.eval()
    try:
        made = convert_by_family(model, cell["family"], cell["length"])
    except UserError as error:
        return measured | _test(cell, model, None) | {"refused": str(error)}
    params = [layer.params for layer in made.layers]
    return {
        **measured,
        **_test(cell, model, made.model),
        "method": made.layers[0].method,
        "order": max(part.order() for part in params),
        "largest_pole": max(part.largest_pole() for part in params),
        "refused": made.refused,
    }


def _train(model: Model, cell: Record) -> float:
    """Train in place on batches of the cell's seed, and return the seconds per step."""
    steps = cell["steps"]
    config = OptimConfig(
        lr=cell["lr"], kernel_lr_scale=cell["kernel_lr_scale"], weight_decay=0.0, warmup_steps=min(20, steps)
    )
    batches = (_sample(cell, cell["seed"], step, cell["batch"]) for step in range(steps))
    trace = fit(model, batches, partial(_loss, cell), config, steps, what=f"{cell['task']}, {cell['family']}")
    return (trace.marks[-1] - trace.marks[0]) / steps


def _sample(cell: Record, seed: int, batch: int, rows: int) -> Batch:
    """Sample a batch of the cell's task."""
    if cell["task"] == "copying":
        blanks = cell["length"] - 2 * cell["lag"]
        sizes = {"symbols": cell["lag"], "vocab_size": cell["vocab_size"], "blanks": blanks}
        return copying(seed, batch, rows=rows, **sizes)
    return delay(seed, batch, rows=rows, length=cell["length"], lag=cell["lag"])


def _loss(cell: Record, model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(batch.inputs)[:, -batch.targets.shape[1] :]
    if cell["task"] == "copying":
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten())
    return nn.functional.mse_loss(outputs, batch.targets)


@torch.no_grad()
def _test(cell: Record, model: Model, converted: Model | None) -> Record:
    """Return the scores in parallel and recurrent form, the score without memory, and their difference."""
    sums: defaultdict[str, float] = defaultdict(float)
    for number, start in enumerate(range(0, cell["test_rows"], _TEST_ROWS)):
        batch = _sample(cell, _TEST, number, min(cell["test_rows"] - start, _TEST_ROWS))
        inputs, targets = (part.to(device_of()) for part in batch)
        outputs = model(inputs)[:, -targets.shape[1] :]
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


def _points(cell: Record, outputs: Tensor, targets: Tensor) -> float:
    """Return the number of correct symbols, or the sum of squared errors of a signal."""
    if cell["task"] == "copying":
        return float((outputs.argmax(-1) == targets).sum())
    return float((outputs - targets).double().square().sum())


def _measure_cost(cell: Record, data: Files) -> Record:
    """Time training steps of a single RTF layer, interleaved over several state sizes.

    Returns:
        ``seconds`` (medians) and ``peak_bytes`` (peak allocation of a step, without the parameters, which
        grow with the state), by state size as strings.
    """
    torch.manual_seed(cell["seed"])
    x = torch.randn(cell["batch"], cell["length"], cell["d_model"], device=device_of())
    steps = {str(n): _layer_step(n, x) for n in cell["state_sizes"]}
    seconds = medians(interleaved(steps, cell["rounds"], warm_up=_WARM_UP))
    return {"seconds": seconds, "peak_bytes": {n: peak_allocated(step) for n, step in steps.items()}}


def _layer_step(state_size: int, x: Tensor) -> Callable[[], None]:
    """Return a call that computes taps, convolution and their gradients."""
    config = RTFConfig(name="rtf", state_size=state_size, denominators=1, init="xavier", constraint="montel")
    conv = LongConv(build_kernel(config, x.shape[2], x.shape[1])).to(x.device)

    def step() -> None:
        conv.zero_grad()
        loss: Tensor = conv(x).square().mean()
        loss.backward()

    return step


_TRAINED = (Section(grid=partial(_task_grid, task), measure=measure_task) for task in TASKS)
_COST = Section(grid=_cost_grid, measure=_measure_cost)
SYNTHETIC = Experiment(sections=(*_TRAINED, _COST, *SAYS), **TEXTS.named("experiment"))
