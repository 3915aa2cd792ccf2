"""One plain training loop, the same for every architecture, loss and source of batches; and perplexity of
any form of a trained model on held-out text, by the length of the rows that it reads."""

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
from tnnlm.config.schema import Config, ConversionConfig, OptimConfig
from tnnlm.conversion import convert_model
from tnnlm.data.packing import PackedCorpus, PackedRows
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.errors import DataError, UserError
from tnnlm.evaluation import NLL, add, bits_per_byte, parallel_nll, recurrent_nll
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.estimate import resolve_precision
from tnnlm.training.optim import build_optimizer, build_scheduler

WINDOW = 10
"""steps over which loss and speed are averaged; speeds leave the first window out"""
PASS_TOKENS = 1 << 13
"""tokens in one pass of a model"""
_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


class Trace(NamedTuple):
    """What a training was like: one entry per window of steps."""

    steps: list[int]
    losses: list[float]
    marks: list[float]
    """clock, in seconds; one more: its start"""


def device_of(config: Config | None = None) -> torch.device:
    """A GPU where there is one and ``trainer.accelerator`` doesn't say cpu."""
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
    """Train ``model`` in place, on the device that it lies on.

    Args:
        model: initialised.
        batches: as many as steps times ``accumulate``.
        loss_of: mean loss of a batch, called under autocast.
        optim: optimizer and schedule.
        steps: of the optimizer.
        what: is trained, for the progress bar.
        accumulate: batches per step.
        dtype: of autocast; float32: without.

    Raises:
        UserError: for a loss that is not finite.
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
            mean = float(torch.stack(window).mean())  # waits for the device, so the clock below is right
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
    """Train a family to guess the next token; initialisation and order of the data follow from ``seed``.

    As :func:`train_plain`, on rows of the training split, at least one batch.
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
    """Train ``model`` in place by the settings of a run, on a GPU if there is one.

    Args:
        name: of what is trained, for the progress bar and errors.
        model: initialised.
        config: everything but the model.
        rows: of the training split, at least one batch.
        seed: of the order of the data.
        loss_of: mean loss of a batch, called under autocast.
        resampled: rows are indexed by (row, sample), as ``GlobalOrderSampler`` has it.

    Returns:
        ``steps``, ``tokens``, ``seconds``, ``tokens_per_second`` (median of the windows) and ``curve``:
        (tokens read, mean loss) per window.

    Raises:
        UserError: for a precision that this loop hasn't, and a loss that is not finite.
    """
    precision = resolve_precision(config)
    if precision not in _DTYPES:
        raise UserError(f"trainer.precision={precision}: families are compared in {' or '.join(_DTYPES)}")
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
    """Mean cross-entropy of rows (B, L + 1) in nats per token, for any model that gives logits."""
    logits = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _speed(trace: Trace, steps: int, tokens: int) -> float:
    """Median tokens/s of the full windows after the first; of the whole run if there is none."""
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
    return DataLoader(
        rows, batch_sampler=order, num_workers=config.data.num_workers, pin_memory=torch.cuda.is_available()
    )


def score(model: Any, rows: Tensor, chunk: int | None) -> NLL:
    """Score rows (B, L + 1), some at a time: in parallel, or recurrently in chunks of so many tokens."""
    device = next(model.parameters()).device
    parts = rows.to(device).split(max(1, PASS_TOKENS // (rows.shape[1] - 1)))
    if chunk is None:
        return add([parallel_nll(model, part) for part in parts])
    return add([recurrent_nll(model, part, chunk) for part in parts])


def spread(rows: PackedRows, tokens: int) -> Tensor:
    """Evenly spaced rows of about ``tokens`` together, one at the least: (B, L + 1)."""
    n = min(len(rows), max(1, tokens // rows.length))
    return torch.stack([rows[int(i)] for i in torch.linspace(0, len(rows) - 1, n).round().long()])


def held_out_bits(model: nn.Module, corpus: PackedCorpus, config: Config, tokens: int) -> float:
    """Bits per byte of the parallel form at the training length, over about so many held-out tokens."""
    rows = corpus.rows("val", config.model.max_length, config.data.max_val_tokens)
    nll = score(model.eval(), spread(rows, tokens), None)
    return bits_per_byte(nll.mean, corpus.val.bytes_per_token)


def recurrent_forms(model: CausalLM, recipe: ConversionConfig) -> dict[str, CausalLM]:
    """A trained model converted by its family's own settings, then by ``auto``, by method.

    Raises:
        UserError: if one of them can't be had.
    """
    auto = dataclasses.replace(recipe, method="auto")
    return {str(own.method): convert_model(model.eval(), own) for own in (recipe, auto)}


def perplexities(
    model: nn.Module,
    forms: Mapping[str, Any],
    corpus: PackedCorpus,
    config: Config,
    tokens: int,
    multiples: tuple[int, ...],
) -> tuple[int, dict[str, dict[str, float]]]:
    """Perplexity of all forms on the same held-out tokens, read in rows of every length.

    Args:
        model: in its parallel form.
        forms: by name, its recurrent ones.
        corpus: whose held-out text is read.
        config: of the model.
        tokens: how many, about; the same at every length.
        multiples: lengths in training lengths, of which the text may fill only the first.

    Returns:
        how many tokens were scored, and by form, ``parallel`` first, perplexity by length.

    Raises:
        DataError: if the held-out text doesn't fill a row of the training length.
    """
    trained = config.model.max_length
    multiples = tuple(m for m in multiples if len(corpus.rows("val", m * trained)))
    if not multiples:
        raise DataError(f"the held-out text doesn't fill one row of {trained} tokens: give more of it")
    spans = spread(corpus.rows("val", max(multiples) * trained), tokens)
    rows = {m * trained: spans.unfold(1, m * trained + 1, m * trained).flatten(0, 1) for m in multiples}
    found = {"parallel": {str(n): score(model.eval(), part, None).ppl for n, part in rows.items()}}
    for name, form in forms.items():
        found[name] = {str(n): score(form, part, config.conversion.chunk).ppl for n, part in rows.items()}
    return spans[:, 1:].numel(), found
