"""Training loop for all architectures, losses and data sets, and perplexity of the models by length."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from experiments.frame import Record
from experiments.sizing import Family
from tnnlm.config.optim import OptimConfig
from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion import convert_model
from tnnlm.data.packing import PackedCorpus, PackedRows
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.errors import DataError, UserError
from tnnlm.evaluation import NLL, add, bits_per_byte, parallel_nll, recurrent_nll
from tnnlm.machine.threads import loader_processes
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.estimate import resolve_precision
from tnnlm.training.optim import build_optimizer, build_scheduler

WINDOW = 10
"""Steps over which loss and speed are averaged; the first window does not count for the speed."""
PASS_TOKENS = 1 << 13
"""Tokens per forward pass when a model is scored."""
_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


class Trace(NamedTuple):
    """History of a training run, with one entry per window of steps."""

    steps: list[int]
    losses: list[float]
    marks: list[float]
    """Clock readings in seconds, the first one at the start of the training."""


def device_of(config: Config | None = None) -> torch.device:
    """Return the GPU if there is one and ``trainer.accelerator`` is not cpu, else the CPU."""
    allowed = config is None or config.trainer.accelerator != "cpu"
    return torch.device("cuda" if allowed and torch.cuda.is_available() else "cpu")


def fit(
    model: nn.Module,
    batches: Iterator[Any],
    loss_of: Callable[[Any, Any], Tensor],
    optim: OptimConfig,
    steps: int,
    *,
    what: str = "",
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Trace:
    """Train ``model`` in place on its device.

    Args:
        model: Initialised model.
        batches: Batches, ``steps`` times ``accumulate`` of them.
        loss_of: Returns the mean loss of the model on a batch; called under autocast.
        optim: Settings of optimizer and schedule.
        steps: Optimizer steps.
        what: Name of the model for the progress bar and errors.
        accumulate: Batches per step.
        dtype: Type of autocast; float32 disables it.

    Raises:
        UserError: If the loss is not finite.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, steps)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    window: list[Tensor] = []
    trace = Trace([], [], [time.perf_counter()])
    for step in tqdm(range(1, steps + 1), desc=what, leave=False, disable=None):
        for _ in range(accumulate):
            batch = move_data_to_device(next(batches), device)
            with autocast:
                loss = loss_of(model, batch)
            (loss / accumulate).backward()
            window.append(loss.detach())
        if optim.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % WINDOW == 0 or step == steps:
            mean = float(torch.stack(window).mean())  # waits for the device before the clock is read
            if not math.isfinite(mean):
                raise UserError(
                    f"{what}: the loss is not finite by step {step}; lower the learning rate, {optim.lr:g}"
                )
            window = []
            trace.steps.append(step)
            trace.losses.append(mean)
            trace.marks.append(time.perf_counter())
    return trace


def train_family(family: Family, rows: PackedRows, seed: int) -> tuple[nn.Module, Record]:
    """Train a family on next-token prediction; ``seed`` decides initialisation and order of the data.

    Returns the model and the record of :func:`train_plain`; ``rows`` must fill at least one batch.
    """
    model = family.build(seed)
    return model, train_plain(family.name, model, family.config, rows, seed, next_token_loss)


def train_plain(
    name: str,
    model: nn.Module,
    config: Config,
    rows: Dataset[Any],
    seed: int,
    loss_of: Callable[[Any, Any], Tensor],
    *,
    resampled: bool = False,
) -> Record:
    """Train ``model`` in place with the settings of a run, on a GPU if there is one.

    Args:
        name: Name of the model for the progress bar and errors.
        model: Initialised model.
        config: Settings of data, optimizer and trainer.
        rows: Training split, at least one batch.
        seed: Seed of the order of the data.
        loss_of: Returns the mean loss of the model on a batch; called under autocast.
        resampled: Index the rows by (row, sample), see ``GlobalOrderSampler``.

    Returns:
        ``steps``, ``tokens``, ``seconds``, ``tokens_per_second`` (median of the windows) and ``curve``:
        (tokens processed, mean loss) per window.

    Raises:
        UserError: If the precision is not supported or the loss is not finite.
    """
    precision = resolve_precision(config)
    if precision not in _DTYPES:
        raise UserError(f"trainer.precision={precision}: not supported here; use {' or '.join(_DTYPES)}")
    model.to(device_of(config))
    if config.trainer.compile:
        model.compile()
    steps, accumulate = config.trainer.max_steps, config.trainer.accumulate
    trace = fit(
        model,
        iter(_loader(rows, config, seed, resampled)),
        loss_of,
        config.optim,
        steps,
        what=f"{name}, seed {seed}",
        accumulate=accumulate,
        dtype=_DTYPES[precision],
    )
    tokens = config.data.batch_size * config.model.max_length * accumulate
    return {
        "steps": steps,
        "tokens": steps * tokens,
        "seconds": trace.marks[-1] - trace.marks[0],
        "tokens_per_second": _speed(trace, steps, tokens),
        "curve": [[step * tokens, loss] for step, loss in zip(trace.steps, trace.losses, strict=True)],
    }


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of rows (B, L + 1), in nats per token; the model returns logits."""
    logits = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _speed(trace: Trace, steps: int, tokens: int) -> float:
    """Return the median tokens/s of the full windows after the first, or else of the whole run."""
    marks = trace.marks
    full = marks[1 : 1 + steps // WINDOW]
    speeds = [WINDOW * tokens / (after - before) for before, after in pairwise(full)]
    return statistics.median(speeds) if speeds else steps * tokens / (marks[-1] - marks[0])


def _loader(rows: Any, config: Config, seed: int, resampled: bool) -> DataLoader[Any]:
    order = GlobalOrderSampler(
        len(rows),
        batch_size=config.data.batch_size,
        n_batches=config.trainer.max_steps * config.trainer.accumulate,
        seed=seed,
        resampled=resampled,
    )
    workers = loader_processes(config.data.num_workers)
    return DataLoader(rows, batch_sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available())


def score(model: Any, rows: Tensor, chunk: int | None) -> NLL:
    """Score rows (B, L + 1) in parallel, or recurrently in chunks of ``chunk`` tokens if it is given."""
    device = next(model.parameters()).device
    parts = rows.to(device).split(max(1, PASS_TOKENS // (rows.shape[1] - 1)))
    if chunk is None:
        return add([parallel_nll(model, part) for part in parts])
    return add([recurrent_nll(model, part, chunk) for part in parts])


def spread(rows: PackedRows, tokens: int) -> Tensor:
    """Return evenly spaced rows (B, L + 1) of about ``tokens`` tokens in total, at least one row."""
    n = min(len(rows), max(1, tokens // rows.length))
    return torch.stack([rows[int(i)] for i in torch.linspace(0, len(rows) - 1, n).round().long()])


def held_out_bits(model: nn.Module, corpus: PackedCorpus, config: Config, tokens: int) -> float:
    """Return bits per byte of the parallel form at the training length, on about ``tokens`` held-out ones."""
    rows = corpus.rows("val", config.model.max_length, config.data.max_val_tokens)
    nll = score(model.eval(), spread(rows, tokens), None)
    return bits_per_byte(nll.mean, corpus.val.bytes_per_token)


def recurrent_forms(model: CausalLM, recipe: ConversionConfig) -> dict[str, CausalLM]:
    """Convert a trained model with the settings of its family and with ``auto``; return both by method.

    Raises:
        UserError: If a conversion fails.
    """
    auto = dataclasses.replace(recipe, method="auto")
    return {str(own.method): convert_model(model.eval(), own) for own in (recipe, auto)}


def perplexities(
    model: nn.Module,
    converted: Mapping[str, Any],
    corpus: PackedCorpus,
    config: Config,
    tokens: int,
    multiples: tuple[int, ...],
) -> tuple[int, dict[str, dict[str, float]]]:
    """Compute perplexity in parallel and recurrent form on the same held-out tokens, in rows of every length.

    Args:
        model: Model in its parallel form.
        converted: Converted models, by name.
        corpus: Corpus with the held-out split.
        config: Configuration of the model.
        tokens: Approximate number of tokens, the same at every length.
        multiples: Row lengths in training lengths; those that the split can't fill are skipped.

    Returns:
        Number of scored tokens, and perplexity by name (``parallel`` first) and length.

    Raises:
        DataError: If the held-out split does not fill a row of the training length.
    """
    trained = config.model.max_length
    multiples = tuple(m for m in multiples if len(corpus.rows("val", m * trained)))
    if not multiples:
        raise DataError(f"held-out split: does not fill one row of {trained} tokens; use more text")
    spans = spread(corpus.rows("val", max(multiples) * trained), tokens)
    rows = {m * trained: spans.unfold(1, m * trained + 1, m * trained).flatten(0, 1) for m in multiples}
    found = {"parallel": {str(n): score(model.eval(), part, None).ppl for n, part in rows.items()}}
    for name, other in converted.items():
        found[name] = {str(n): score(other, part, config.conversion.chunk).ppl for n, part in rows.items()}
    return spans[:, 1:].numel(), found
