"""One family trained on one seed, by a plain loop that is the same for every architecture."""

from __future__ import annotations

import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tnnlm.config import Config
from tnnlm.data import GlobalOrderSampler
from tnnlm.errors import UserError
from tnnlm.families import Family
from tnnlm.packing import PackedRows
from tnnlm.training.optim import build_optimizer, build_scheduler
from tnnlm.training.plan import resolve_precision

WINDOW = 10
"""steps over which loss and speed are averaged; speeds leave the first window out"""
_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def device_of(config: Config) -> torch.device:
    """A GPU where there is one and ``trainer.accelerator`` doesn't say cpu."""
    return torch.device(
        "cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    )


def train_family(family: Family, rows: PackedRows, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Train on ``seed``: initialisation and order of the data both follow from it.

    Args:
        family: what is trained.
        rows: of the training split, at least one batch.
        seed: of everything random.

    Returns:
        the model, and ``steps``, ``tokens``, ``seconds``, ``tokens_per_second`` (median of the
        windows) and ``curve``: (tokens read, mean loss) per window.

    Raises:
        UserError: for a precision that this loop hasn't, and a loss that is not finite.
    """
    config, device = family.config, device_of(family.config)
    precision = resolve_precision(config)
    if precision not in _DTYPES:
        raise UserError(f"trainer.precision={precision}: families are compared in {' or '.join(_DTYPES)}")
    model = family.build(seed).to(device).train()
    if config.trainer.compile:
        model.compile()
    optimizer = build_optimizer(model, config.optim)
    steps, accumulate = config.trainer.max_steps, config.trainer.accumulate
    scheduler = build_scheduler(optimizer, config.optim, steps)
    batches = iter(_loader(rows, config, seed))
    autocast = torch.autocast(device.type, _DTYPES[precision], enabled=precision != "32-true")
    window: list[torch.Tensor] = []
    marks, curve = [time.perf_counter()], []
    for step in tqdm(range(1, steps + 1), desc=f"{family.name}, seed {seed}", disable=None):
        for _ in range(accumulate):
            batch = next(batches).to(device, non_blocking=True)
            with autocast:
                logits = model(batch[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
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
                    f"the loss is not finite by step {step} of seed {seed}; lower its "
                    f"learning rate, --lr {family.name}=X (it is {config.optim.lr:g})"
                )
            window = []
            marks.append(time.perf_counter())
            curve.append([step * _tokens(config), mean])
    return model, {
        "steps": steps,
        "tokens": steps * _tokens(config),
        "seconds": marks[-1] - marks[0],
        "tokens_per_second": _speed(marks, steps, _tokens(config)),
        "curve": curve,
    }


def _tokens(config: Config) -> int:
    """Tokens per optimizer step."""
    return config.data.batch_size * config.model.max_length * config.trainer.accumulate


def _speed(marks: list[float], steps: int, tokens: int) -> float:
    """Median tokens/s of the full windows after the first; of the whole run if there is none."""
    full = marks[1 : 1 + steps // WINDOW]
    speeds = [WINDOW * tokens / (after - before) for before, after in pairwise(full)]
    return statistics.median(speeds) if speeds else steps * tokens / (marks[-1] - marks[0])


def _loader(rows: PackedRows, config: Config, seed: int) -> DataLoader[torch.Tensor]:
    order = GlobalOrderSampler(
        len(rows),
        batch_size=config.data.batch_size,
        n_batches=config.trainer.max_steps * config.trainer.accumulate,
        seed=seed,
    )
    return DataLoader(
        rows,
        batch_sampler=order,
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
