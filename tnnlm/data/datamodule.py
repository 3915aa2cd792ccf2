"""LightningDataModule of all tasks, with a data order that resumes exactly on any number of ranks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from tnnlm.config.schema import Config
from tnnlm.data.conversations.order import AnswerSampler, like_lengths
from tnnlm.data.conversations.rows import AnswerRows, collate_answers
from tnnlm.data.loader_process import leave_signals
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.data.tasks import TaskData, load_task_data
from tnnlm.data.timed_loader import TimedLoader, Wait
from tnnlm.machine.threads import loader_processes


class TextDataModule(lightning.LightningDataModule):
    """LightningDataModule with the training and validation rows of a task.

    Batches have the type that the ``loss`` method of the task's model takes. Each checkpoint contains the
    position in the global order, so a resumed run sees the same rows as an uninterrupted one.
    """

    opened: TaskData
    """Data sets and tokenizer; available after :meth:`setup`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.samples_seen = 0
        self.block = config.data.batch_size
        """Number of conversations of like length that follow each other in the global order."""
        self._step_at_load = 0
        self.wait = Wait()
        """Time that the training has waited for batches."""

    def prepare_data(self) -> None:
        """Tokenize or generate the data into the cache; Lightning calls this on one rank per node."""
        load_task_data(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared data sets, on every rank.

        Raises:
            DataError: If the data is unusable, or less than one batch.
        """
        if not hasattr(self, "opened"):
            self.opened = load_task_data(self.config)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the training batches from the current optimizer step to the last one.

        The whole training is one Lightning epoch. Under a Trainer with several epochs, each continues in the
        global order where the one before ended.
        """
        trainer = self._trainer()
        last = trainer.max_steps if trainer.max_steps > 0 else self.config.trainer.max_steps
        left = max(0, last - trainer.global_step)
        rank, ranks = self._place()
        train = self.opened.train
        settings: dict[str, Any] = {
            "batch_size": self.config.data.batch_size,
            "n_batches": left * trainer.accumulate_grad_batches,
            "seed": self.config.seed,
            "start": lambda: self.samples_at(trainer.global_step),
            "rank": rank,
            "world_size": ranks,
        }
        sampler: GlobalOrderSampler
        if isinstance(train, AnswerRows):
            sampler = AnswerSampler(
                len(train),
                **settings,
                lengths=train.sizes,
                answers=train.answers,
                accumulate=trainer.accumulate_grad_batches,
                block=lambda: self.block,
            )
        else:
            sampler = GlobalOrderSampler(
                len(train), **settings, mixture=self.opened.mixture, resampled=self.opened.resampled
            )
        loader = self._loader(train, sampler)
        loader.wait = self.wait
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this rank's validation loader: with N readers, every N-th row.

        If the rows don't divide evenly, row 0 pads the last batch and :meth:`val_counted` excludes it. All
        ranks thus run the same number of batches; with sharded weights a rank with fewer would block the
        others.
        """
        rank, ranks = self._place()
        rows, size = len(self.opened.val), self.config.data.batch_size
        places = range(rank, math.ceil(rows / ranks) * ranks, ranks)
        mine = [row if row < rows else 0 for row in places]
        return self._loader(self.opened.val, [mine[i : i + size] for i in range(0, len(mine), size)])

    def val_counted(self, batch_idx: int) -> int:
        """Return the number of leading rows of this rank's validation batch that are not padding."""
        rank, ranks = self._place()
        mine = len(range(rank, len(self.opened.val), ranks))
        size = self.config.data.batch_size
        return min(size, max(0, mine - batch_idx * size))

    def samples_at(self, global_step: int) -> int:
        """Return the number of samples consumed by all ranks up to optimizer step ``global_step``."""
        _, ranks = self._place()
        per_step = self.config.data.batch_size * self._trainer().accumulate_grad_batches * ranks
        return self.samples_seen + (global_step - self._step_at_load) * per_step

    def tokens_at(self, global_step: int) -> int:
        """Return the number of input tokens processed by all ranks up to optimizer step ``global_step``."""
        samples, train = self.samples_at(global_step), self.opened.train
        if not isinstance(train, AnswerRows):
            return samples * self.config.model.max_length
        epoch, rest = divmod(samples, len(train))
        order = like_lengths(train.sizes, (self.config.seed, epoch), self.block, epoch * len(train))
        return epoch * int(train.sizes.sum()) + int(train.sizes[order[:rest]].sum())

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the global order, which is the same on all ranks."""
        step = self._trainer().global_step
        # The order of rows of text doesn't depend on the size of a batch, and their lengths are equal.
        answers = self.config.data.format != "text"
        order = {"block": self.block, "tokens_seen": self.tokens_at(step)} if answers else {}
        return {"samples_seen": self.samples_at(step), "step": step, **order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved position; batch size, accumulation and number of ranks may differ.

        The position is that of an optimizer step, also if the checkpoint was saved between two batches of a
        step: their gradient isn't saved, so their rows are read again.
        """
        self.samples_seen = state_dict["samples_seen"]
        self._step_at_load = state_dict["step"]
        self.block = state_dict.get("block", self.block)

    def _place(self) -> tuple[int, int]:
        """Return the number of this reader, and the number of readers.

        The ranks of a context group (``trainer.context_parallel``) are one reader: each reads the same rows.
        """
        trainer, size = self._trainer(), self.config.trainer.context_parallel
        return trainer.global_rank // size, trainer.world_size // size

    def _loader(self, rows: Any, batches: Any) -> TimedLoader:
        workers = loader_processes(self.config.data.num_workers)
        answers = isinstance(rows, AnswerRows)
        return TimedLoader(
            rows,
            batch_sampler=batches,
            collate_fn=partial(collate_answers, self.config.model.max_length) if answers else None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals if workers else None,
        )

    def _trainer(self) -> lightning.Trainer:
        assert self.trainer is not None, "attach the data module to a Trainer first"
        return self.trainer
