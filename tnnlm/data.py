"""The LightningDataModule: rows of any task, in an order that resumes exactly on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from tnnlm.config import Config
from tnnlm.encoder import LabelledBatch
from tnnlm.errors import DataError
from tnnlm.loader_process import leave_signals
from tnnlm.masking import MaskedRows, Masking
from tnnlm.packing import PackedCorpus, PackedRows, prepare
from tnnlm.sequences.prepare import prepare_sequences, task_name
from tnnlm.sequences.symbols import symbol_tokenizer
from tnnlm.tokenizer import TextTokenizer


class GlobalOrderSampler(Sampler[list[Any]]):
    """Batches of row indices whose order follows from (seed, samples seen) alone.

    Training reads one endless sequence: a permutation of the rows, then the next, each seeded by
    (seed, epoch). Batch b of rank r on W ranks is samples [(b W + r) B, (b W + r + 1) B) after
    ``start``: the global order is the same on any number of ranks, and resuming is starting later.
    """

    def __init__(
        self,
        n_rows: int,
        *,
        batch_size: int,
        n_batches: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        numbered: bool = False,
    ) -> None:
        """``numbered``: yield (row, sample) in the place of rows, for what is drawn anew at each reading."""
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.n_batches = n_batches
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.numbered = numbered

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        first = self.start + self.rank * self.batch_size
        for batch in range(self.n_batches):
            rows: list[Any] = []
            begin = first + batch * self.world_size * self.batch_size
            for sample in range(begin, begin + self.batch_size):
                if sample // self.n_rows != epoch:
                    epoch = sample // self.n_rows
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.n_rows)
                row = int(order[sample % self.n_rows])
                rows.append((row, sample) if self.numbered else row)
            yield rows


def open_rows(corpus: PackedCorpus, config: Config) -> tuple[PackedRows, PackedRows]:
    """The rows of both splits.

    Raises:
        DataError: if they don't fill one batch to train on, or one row to validate on.
    """
    data, length = config.data, config.model.max_length
    train_rows = corpus.rows("train", length)
    val_rows = corpus.rows("val", length, data.max_val_tokens)
    if len(train_rows) < data.batch_size:
        raise DataError(
            f"too little text: {corpus.train.tokens} training tokens fill {len(train_rows)} rows of "
            f"{length}, one batch takes {data.batch_size}: give more text, or lower data.batch_size or "
            "model.max_length"
        )
    if not len(val_rows):
        raise DataError(
            f"too little text: {corpus.val.tokens} validation tokens fill no row of {length}: give more "
            "text, raise data.val_fraction or data.max_val_tokens, or lower model.max_length"
        )
    return train_rows, val_rows


class TaskData(NamedTuple):
    """What a run reads."""

    train: Any
    """data set of the training rows; of (row, sample) where ``numbered``"""
    val: Any
    """data set of the held-out rows"""
    tokenizer: TextTokenizer
    bytes_per_token: float
    """of the held-out text; 1 where that means nothing"""
    numbered: bool = False
    """what a training row gives depends on how often it was read"""


def open_data(config: Config) -> TaskData:
    """Prepare, or find prepared, what ``config.task`` reads.

    Raises:
        DataError: for unusable data, and too little of it.
    """
    return OPENERS[config.task](config)


def _open_text(config: Config) -> TaskData:
    """Rows (L + 1,): inputs and targets in one tensor."""
    corpus = prepare(config.data, config.model.vocab_size, config.seed)
    return TaskData(*open_rows(corpus, config), corpus.tokenizer, corpus.val.bytes_per_token)


def _open_masked(config: Config) -> TaskData:
    """Rows as ``MaskedBatch``."""
    text, data = _open_text(config), config.data
    assert data.mask_token is not None  # config_io sees to it
    tokenizer = text.tokenizer
    masking = Masking(data.mask_fraction, tokenizer.id_of(data.mask_token), tokenizer.size, config.seed)
    train, val = MaskedRows(text.train, masking), MaskedRows(text.val, masking)
    return text._replace(train=train, val=val, numbered=True)


def _open_sequences(config: Config) -> TaskData:
    """Rows as ``LabelledBatch``."""
    corpus, length = prepare_sequences(config), config.model.max_length
    train = corpus.split("train", length)
    val: Dataset[LabelledBatch] = corpus.split("val", length)
    rows = corpus.rows["val"]
    if len(train) < config.data.batch_size or not rows:
        raise DataError(
            f"too few sequences: {len(train)} to train on, {rows} to validate on; one batch takes "
            f"{config.data.batch_size}: give more, or lower data.batch_size"
        )
    if config.data.max_val_tokens is not None:
        val = Subset(val, range(min(rows, max(1, config.data.max_val_tokens // length))))
    return TaskData(train, val, symbol_tokenizer(task_name(config), config.data.eos_token), 1.0)


OPENERS: dict[str, Callable[[Config], TaskData]] = {
    "causal": _open_text,
    "masked": _open_masked,
    "classify": _open_sequences,
}
"""by task"""


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
        open_data(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Open it.

        Raises:
            DataError: if there is too little for one batch.
        """
        if not hasattr(self, "opened"):
            self.opened = open_data(self.config)

    @property
    def train_rows(self) -> Any:
        """Data set of the training rows."""
        return self.opened.train

    @property
    def val_rows(self) -> Any:
        """Data set of the held-out rows."""
        return self.opened.val

    def train_dataloader(self) -> DataLoader[Any]:
        """Everything that is left to train on, as one Lightning epoch: no border to resume across."""
        trainer = self._trainer()
        sampler = GlobalOrderSampler(
            len(self.train_rows),
            batch_size=self.config.data.batch_size,
            n_batches=self.config.trainer.max_steps * self.config.trainer.accumulate,
            seed=self.config.seed,
            start=self.samples_seen,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            numbered=self.opened.numbered,
        )
        return self._loader(self.train_rows, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Ranks take every world_size-th row, none twice. Where that is uneven, row 0 stands in at
        the end and doesn't count: a rank with a batch less would leave the others waiting for its
        share of the weights, where they are sharded."""
        trainer = self._trainer()
        rows, ranks, size = len(self.val_rows), trainer.world_size, self.config.data.batch_size
        places = range(trainer.global_rank, math.ceil(rows / ranks) * ranks, ranks)
        mine = [row if row < rows else 0 for row in places]
        return self._loader(self.val_rows, [mine[i : i + size] for i in range(0, len(mine), size)])

    def val_counted(self, batch_idx: int) -> int:
        """How many rows of this rank's validation batch count: the first ones; 0 for none."""
        trainer = self._trainer()
        mine = len(range(trainer.global_rank, len(self.val_rows), trainer.world_size))
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
