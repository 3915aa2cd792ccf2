"""The LightningDataModule: rows of any task, in an order that resumes exactly on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from tnnlm.config.schema import Config
from tnnlm.data.loader_process import leave_signals
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.data.tasks import TaskData, load_task_data


class TextDataModule(lightning.LightningDataModule):
    """Rows of a task for training and validation.

    Batches are what its model's ``loss`` takes. The position in the global order is saved with each
    checkpoint, so a resumed run reads what an unbroken one would have.
    """

    opened: TaskData

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.samples_seen = 0
        self._step_at_load = 0

    def prepare_data(self) -> None:
        """Prepare what is kept in the cache: on one rank of each node."""
        load_task_data(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Open it.

        Raises:
            DataError: if there is too little for one batch.
        """
        if not hasattr(self, "opened"):
            self.opened = load_task_data(self.config)

    def train_dataloader(self) -> DataLoader[Any]:
        """Everything that is left to train on, as one Lightning epoch: no border to resume across."""
        trainer = self._trainer()
        sampler = GlobalOrderSampler(
            len(self.opened.train),
            batch_size=self.config.data.batch_size,
            n_batches=self.config.trainer.max_steps * self.config.trainer.accumulate,
            seed=self.config.seed,
            start=self.samples_seen,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            resampled=self.opened.resampled,
        )
        return self._loader(self.opened.train, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Ranks take every world_size-th row, none twice. Where that is uneven, row 0 stands in at
        the end and doesn't count: a rank with a batch less would leave the others waiting for its
        share of the weights, where they are sharded."""
        trainer = self._trainer()
        rows, ranks, size = len(self.opened.val), trainer.world_size, self.config.data.batch_size
        places = range(trainer.global_rank, math.ceil(rows / ranks) * ranks, ranks)
        mine = [row if row < rows else 0 for row in places]
        return self._loader(self.opened.val, [mine[i : i + size] for i in range(0, len(mine), size)])

    def val_counted(self, batch_idx: int) -> int:
        """How many rows of this rank's validation batch count: the first ones; 0 for none."""
        trainer = self._trainer()
        mine = len(range(trainer.global_rank, len(self.opened.val), trainer.world_size))
        size = self.config.data.batch_size
        return min(size, max(0, mine - batch_idx * size))

    def samples_at(self, global_step: int) -> int:
        """Samples that all ranks together have read after ``global_step`` optimizer steps."""
        config = self.config
        per_step = config.data.batch_size * config.trainer.accumulate * self._trainer().world_size
        return self.samples_seen + (global_step - self._step_at_load) * per_step

    def state_dict(self) -> dict[str, Any]:
        """The position in the global order; the same on every rank."""
        step = self._trainer().global_step
        return {"samples_seen": self.samples_at(step), "step": step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position, with whatever batch size and number of ranks there is now."""
        self.samples_seen = state_dict["samples_seen"]
        self._step_at_load = state_dict["step"]

    def _loader(self, rows: Any, batches: Any) -> DataLoader[Any]:
        workers = self.config.data.num_workers
        return DataLoader(
            rows,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals if workers else None,
        )

    def _trainer(self) -> lightning.Trainer:
        assert self.trainer is not None, "attach the data module to a Trainer first"
        return self.trainer
