"""Resuming with another batch size, accumulation or number of devices, against a plain training loop.

The reference knows neither batches nor Lightning: an optimizer step takes the next rows of the global order
at once. The weights are compared to rounding: one wrong row changes them by the learning rate.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import default_collate

from tests.support.ranks import run_ranks
from tests.support.training_runs import SETTINGS, row_marks, write_text
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.data.tasks import load_task_data
from tnnlm.training.callbacks.checkpoint import TrainingStopped
from tnnlm.training.lit_module import LitModel
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.optim import build_optimizer, build_scheduler
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
STEPS = 7
COMMON = (
    *(word for word in SETTINGS if word.startswith(("model.kernel", "trainer.sample", "trainer.acc"))),
    "model.d_model=16",
    "model.n_layers=1",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every_n_steps=3",
    "trainer.log_every_n_steps=4",
    "trainer.sample_tokens=0",
    "trainer.precision=64-true",
    "checkpoint.every_n_steps=2",
    "optim.schedule=constant",
    "optim.warmup_steps=2",
    "data.max_val_tokens=300",
)
TEXT = (
    "data.source=files",
    "data.files=text.txt",
    "data.val_fraction=0.05",
    "model.vocab_size=300",
    "model.max_length=16",
)
LISTOPS = (
    "data.source=listops",
    "data.listops.min_length=4",
    "data.listops.max_length=12",
    "data.listops.max_depth=2",
    "data.listops.train_rows=50",  # an epoch ends within the run
    "data.listops.val_rows=9",
    "data.listops.test_rows=9",
    "model.vocab_size=16",
    "model.max_length=12",
    "model.n_classes=10",
)
TASKS = {
    "causal": TEXT,
    "masked": ("task=masked", *TEXT),
    "classify": ("task=classify", *LISTOPS),
}
OPTIONS: dict[str, Any] = {
    "use_distributed_sampler": False,
    "logger": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "precision": "64-true",
    "accelerator": "cpu",
    "enable_checkpointing": False,
}
"""Options of a Trainer of the user's own."""
Split = tuple[int, int]
"""Batch size and number of accumulated batches."""


class Watch(Callback):
    """Callback that records rows and the initial weights, and may request a stop within a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.rows: list[int] = []
        self.start: dict[str, torch.Tensor] = {}
        self.validated: list[int] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the weights of the beginning."""
        assert isinstance(pl_module, LitModel)
        self.start = {name: value.clone() for name, value in pl_module.model.state_dict().items()}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the rows, and request a stop at the end of this step."""
        self.rows += row_marks(batch)
        if self.stop is not None and trainer.global_step == self.stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Record the step of a validation."""
        self.validated.append(trainer.global_step)


def config_of(task: str, split: Split, *words: str) -> Config:
    if not Path("text.txt").exists():
        write_text()
    size, accumulate = split
    given = (f"data.batch_size={size}", f"trainer.accumulate={accumulate}", *words)
    return load_config(None, [*COMMON, *TASKS[task], *given])


def run_of(name: str) -> Path:
    return Path("runs") / name


def stopped_run(task: str, split: Split, stop: int, name: str = "broken") -> Watch:
    """Train until SIGTERM within step ``stop``."""
    watch = Watch(stop)
    with pytest.raises(TrainingStopped):
        train(config_of(task, split, f"name={name}"), extra_callbacks=[watch])
    return watch


def reference(config: Config, start: dict[str, torch.Tensor], plan: list[int]) -> tuple[Any, list[int]]:
    """Train in a plain loop on ``plan[s]`` rows in step s; return the weights and the rows."""
    model = LitModel(config).model.double()
    model.load_state_dict(start)
    optimizer = build_optimizer(model, config.optim, fused=False)
    scheduler = build_scheduler(optimizer, config.optim, config.trainer.max_steps)
    data = load_task_data(config)
    n, seen = len(data.train), 0
    orders = [np.random.default_rng((config.seed, epoch)).permutation(n) for epoch in range(20)]
    rows: list[int] = []
    for count in plan:
        picked = [(int(orders[i // n][i % n]), i) for i in range(seen, seen + count)]
        batch = default_collate([data.train[pair if data.resampled else pair[0]] for pair in picked])
        rows += row_marks(batch)
        optimizer.zero_grad()
        model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        scheduler.step()
        seen += count
    return model.state_dict(), rows


def in_order(ranks: list[dict[str, Any]]) -> list[int]:
    """Return the rows of several ranks in the global order: batch by batch, rank by rank."""
    batches = zip(*(rank["rows"] for rank in ranks), strict=True)
    return [row for batch in batches for part in batch for row in part]


def check_run(
    run: Path, weights: Any, plan: list[int], length: int, logged: tuple[str, ...] = ("4", "7")
) -> None:
    """Check weights, tokens seen, validations and the logged steps of a finished run."""
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    for name, value in weights.items():
        torch.testing.assert_close(saved["state_dict"][f"model.{name}"], value, rtol=0, atol=2e-6)
    assert saved["TextDataModule"] == {"samples_seen": sum(plan), "step": len(plan)}
    assert json.loads((run / "summary.json").read_text())["tokens_seen"] == sum(plan) * length
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows if row["val/loss"]] == ["3", "6", "7"]
    assert tuple(row["step"] for row in rows if row["train/loss"]) == logged


def loss_of(run: Path) -> float:
    return next(float(row["train/loss"]) for row in read_metrics(run / "metrics.csv") if row["train/loss"])


SAME_ROWS = (((4, 1), 3), ((2, 2), 4), ((1, 4), 6), ((4, 1), STEPS))
FEWER_AND_MORE = (((4, 1), 3), ((2, 1), 4), ((2, 4), 6), ((3, 1), STEPS))


@pytest.mark.parametrize("splits", [SAME_ROWS, FEWER_AND_MORE], ids=["same rows", "fewer and more rows"])
@pytest.mark.parametrize("task", TASKS)
def test_resuming_with_another_split_goes_on_with_the_next_rows(
    task: str, splits: tuple[tuple[Split, int], ...]
) -> None:
    watches, plan = [], list[int]()
    config, run = config_of(task, splits[0][0], "name=broken"), None
    for (size, accumulate), end in splits:
        if run is not None:
            config = resumed_config(run, [f"data.batch_size={size}", f"trainer.accumulate={accumulate}"])
        watch = Watch(end if end < STEPS else None)
        with pytest.raises(TrainingStopped) if end < STEPS else nullcontext():
            train(config, run, extra_callbacks=[watch])
        run = run_of("broken")
        watches.append(watch)
        plan += [size * accumulate] * (end - len(plan))
    weights, rows = reference(config, watches[0].start, plan)
    assert [row for watch in watches for row in watch.rows] == rows
    assert [step for watch in watches for step in watch.validated] == [3, 6, 7]
    check_run(run_of("broken"), weights, plan, config.model.max_length)


@pytest.mark.parametrize("task", TASKS)
def test_the_logged_loss_is_the_mean_over_steps_whatever_their_split(task: str) -> None:
    train(config_of(task, (4, 1), "name=whole"))
    stopped_run(task, (4, 1), 3)
    run = run_of("broken")
    train(resumed_config(run, ["data.batch_size=1", "trainer.accumulate=4"]), run)
    assert loss_of(run) == pytest.approx(loss_of(run_of("whole")), rel=1e-6)


@pytest.mark.parametrize("after", [(1, 2), (3, 1)], ids=["same rows per step", "more rows per step"])
@pytest.mark.parametrize("task", TASKS)
def test_resuming_on_two_devices_goes_on_with_the_next_rows(task: str, after: Split) -> None:
    first = stopped_run(task, (4, 1), 3)
    run = run_of("broken")
    words = (f"data.batch_size={after[0]}", f"trainer.accumulate={after[1]}", "trainer.strategy=ddp")
    ranks = run_ranks(2, *words, resume=str(run))
    plan = [4] * 3 + [2 * after[0] * after[1]] * (STEPS - 3)
    config = resumed_config(run, [])
    weights, rows = reference(config, first.start, plan)
    together = [
        row for batches in zip(*(rank["rows"] for rank in ranks), strict=True) for b in batches for row in b
    ]
    assert first.rows + together == rows
    check_run(run, weights, plan, config.model.max_length)


def test_resuming_on_one_device_after_two_goes_on_with_the_next_rows() -> None:
    words = (
        *COMMON,
        *TEXT,
        "data.batch_size=2",
        "trainer.strategy=ddp",
        "name=broken",
        "trainer.max_steps=3",
    )
    write_text()
    ranks = run_ranks(2, *words)
    run, second, start = run_of("broken"), Watch(), Watch()
    train(config_of("causal", (4, 1), "name=start", "trainer.max_steps=1"), extra_callbacks=[start])
    changes = [f"trainer.max_steps={STEPS}", "data.batch_size=1", "trainer.accumulate=3"]
    changes += ["trainer.devices=1", "trainer.strategy=auto"]  # no process group in the process of the tests
    config = resumed_config(run, changes)
    train(config, run, extra_callbacks=[second])
    plan = [4] * 3 + [3] * (STEPS - 3)
    weights, rows = reference(config, start.start, plan)
    before = [
        row for batches in zip(*(rank["rows"] for rank in ranks), strict=True) for b in batches for row in b
    ]
    assert before + second.rows == rows
    # The first part was complete, so its last step was logged too.
    check_run(run, weights, plan, config.model.max_length, logged=("3", "4", "7"))


def test_a_trainer_of_the_users_own_counts_by_its_own_accumulation() -> None:
    config, watch = config_of("causal", (2, 1)), Watch()
    trainer = lightning.Trainer(**OPTIONS, max_steps=5, accumulate_grad_batches=3, callbacks=[watch])
    data = TextDataModule(config)
    trainer.fit(LitModel(config), data)
    _, rows = reference(config, watch.start, [6] * 5)
    assert watch.rows == rows
    assert data.samples_at(trainer.global_step) == 30


def test_several_epochs_of_a_trainer_continue_in_the_order() -> None:
    config, watch = config_of("causal", (2, 1), "trainer.max_steps=3"), Watch()
    trainer = lightning.Trainer(**OPTIONS, max_epochs=2, callbacks=[watch])
    trainer.fit(LitModel(config), TextDataModule(config))
    _, rows = reference(config, watch.start, [2] * 6)
    assert watch.rows == rows


class SaveWithinStep(Callback):
    """Callback that saves after the second of three batches of the second step."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 4:
            trainer.save_checkpoint("within.ckpt")


def test_a_checkpoint_within_a_step_resumes_at_the_step_before() -> None:
    config, first, second = config_of("causal", (2, 3)), Watch(), Watch()
    callbacks = [first, SaveWithinStep()]
    whole = lightning.Trainer(**OPTIONS, max_steps=4, accumulate_grad_batches=3, callbacks=callbacks)
    whole.fit(LitModel(config), TextDataModule(config))
    again = lightning.Trainer(**OPTIONS, max_steps=4, accumulate_grad_batches=2, callbacks=[second])
    module = LitModel(config)
    again.fit(module, TextDataModule(config), ckpt_path="within.ckpt", weights_only=True)
    weights, rows = reference(config, first.start, [6, 4, 4, 4])
    assert second.rows == rows[6:]
    for name, value in weights.items():
        torch.testing.assert_close(module.model.state_dict()[name], value, rtol=0, atol=2e-6)
