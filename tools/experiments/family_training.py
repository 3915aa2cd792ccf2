"""One model trained on one seed, by a plain loop that is the same for every architecture and loss."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from experiments.sizing import Family
from tnnlm.config.schema import Config
from tnnlm.data.packing import PackedRows
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.errors import UserError
from tnnlm.training.estimate import resolve_precision
from tnnlm.training.optim import build_optimizer, build_scheduler

WINDOW = 10
"""steps over which loss and speed are averaged; speeds leave the first window out"""
_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def device_of(config: Config) -> torch.device:
    """A GPU where there is one and ``trainer.accelerator`` doesn't say cpu."""
    return torch.device(
        "cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    )


def train_family(family: Family, rows: PackedRows, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Train a family to guess the next token; initialisation and order of the data follow from ``seed``.

    As :func:`train_plain`, on rows of the training split, at least one batch.
    """
    model = family.build(seed)
    remedy = f"lower its learning rate, --lr {family.name}=X"
    return model, train_plain(family.name, model, family.config, rows, seed, _next_token_loss, remedy=remedy)


def train_plain(
    name: str,
    model: nn.Module,
    config: Config,
    rows: Dataset[Any],
    seed: int,
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    *,
    numbered: bool = False,
    remedy: str = "lower its learning rate",
) -> dict[str, Any]:
    """Train ``model`` in place, on a GPU if there is one.

    Args:
        name: of what is trained, for the progress bar and errors.
        model: initialised.
        config: everything but the model.
        rows: of the training split, at least one batch.
        seed: of the order of the data.
        loss_of: mean loss of a batch, called under autocast.
        numbered: rows are indexed by (row, sample), as ``GlobalOrderSampler`` has it.
        remedy: what to do if the loss is not finite.

    Returns:
        ``steps``, ``tokens``, ``seconds``, ``tokens_per_second`` (median of the windows) and ``curve``:
        (tokens read, mean loss) per window.

    Raises:
        UserError: for a precision that this loop hasn't, and a loss that is not finite.
    """
    device, precision = device_of(config), resolve_precision(config)
    if precision not in _DTYPES:
        raise UserError(f"trainer.precision={precision}: families are compared in {' or '.join(_DTYPES)}")
    model.to(device).train()
    if config.trainer.compile:
        model.compile()
    optimizer = build_optimizer(model, config.optim)
    steps, accumulate = config.trainer.max_steps, config.trainer.accumulate
    scheduler = build_scheduler(optimizer, config.optim, steps)
    batches = iter(_loader(rows, config, seed, numbered))
    autocast = torch.autocast(device.type, _DTYPES[precision], enabled=precision != "32-true")
    window: list[torch.Tensor] = []
    marks, curve = [time.perf_counter()], []
    for step in tqdm(range(1, steps + 1), desc=f"{name}, seed {seed}", disable=None):
        for _ in range(accumulate):
            batch = move_data_to_device(next(batches), device)
            with autocast:
                loss = loss_of(model, batch)
            (loss / accumulate).backward()
            window.append(loss.detach())
        if config.optim.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % WINDOW == 0 or step == steps:
            mean = float(torch.stack(window).mean())  # waits for the device, so the clock below is right
            if not math.isfinite(mean):
                raise UserError(
                    f"the loss is not finite by step {step} of seed {seed}; {remedy} "
                    f"(it is {config.optim.lr:g})"
                )
            window = []
            marks.append(time.perf_counter())
            curve.append([step * _tokens(config), mean])
    return {
        "steps": steps,
        "tokens": steps * _tokens(config),
        "seconds": marks[-1] - marks[0],
        "tokens_per_second": _speed(marks, steps, _tokens(config)),
        "curve": curve,
    }


def _next_token_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def _tokens(config: Config) -> int:
    """Tokens per optimizer step."""
    return config.data.batch_size * config.model.max_length * config.trainer.accumulate


def _speed(marks: list[float], steps: int, tokens: int) -> float:
    """Median tokens/s of the full windows after the first; of the whole run if there is none."""
    full = marks[1 : 1 + steps // WINDOW]
    speeds = [WINDOW * tokens / (after - before) for before, after in pairwise(full)]
    return statistics.median(speeds) if speeds else steps * tokens / (marks[-1] - marks[0])


def _loader(rows: Any, config: Config, seed: int, numbered: bool) -> DataLoader[Any]:
    order = GlobalOrderSampler(
        len(rows),
        batch_size=config.data.batch_size,
        n_batches=config.trainer.max_steps * config.trainer.accumulate,
        seed=seed,
        numbered=numbered,
    )
    return DataLoader(
        rows,
        batch_sampler=order,
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
