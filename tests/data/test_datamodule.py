"""Order of the training data: the same sequence on any number of ranks, resumable at any step."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.models import tiny_config
from tnnlm.config.schema import Config, DataConfig, TrainerConfig
from tnnlm.data.datamodule import TextDataModule
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.errors import DataError


def samples(n_rows: int = 11, *, batch_size: int, n_batches: int, **changes: Any) -> list[list[int]]:
    """Return all batches of one rank."""
    sampler = GlobalOrderSampler(
        n_rows, **{"batch_size": batch_size, "n_batches": n_batches, "seed": 3, **changes}
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [0, 7])
def test_sampler_order_is_independent_of_ranks(world_size: int, start: int) -> None:
    # With eleven rows, epochs end inside batches.
    ranks = [
        samples(batch_size=4, n_batches=6, rank=rank, world_size=world_size, start=start)
        for rank in range(world_size)
    ]
    together = [flat(list(batch)) for batch in zip(*ranks, strict=True)]
    assert together == samples(batch_size=4 * world_size, n_batches=6, start=start)


@pytest.mark.parametrize("start", [1, 4, 11, 12, 40])
def test_sampler_start_skips_exactly(start: int) -> None:
    whole = flat(samples(batch_size=1, n_batches=60))
    assert flat(samples(batch_size=4, n_batches=5, start=start)) == whole[start : start + 20]


def test_sampler_epochs_are_permutations() -> None:
    order = flat(samples(batch_size=1, n_batches=33))
    epochs = [order[i : i + 11] for i in range(0, 33, 11)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_sampler_seeds_differ_and_repeat() -> None:
    assert samples(batch_size=11, n_batches=1, seed=1) != samples(batch_size=11, n_batches=1, seed=2)
    assert samples(batch_size=11, n_batches=1, seed=1) == samples(batch_size=11, n_batches=1, seed=1)


def test_sampler_batch_may_be_larger_than_the_data() -> None:
    assert sorted(flat(samples(2, batch_size=6, n_batches=1))) == [0, 0, 0, 1, 1, 1]


def config_of(n_lines: int = 400, **data: Any) -> Config:
    """Return the configuration of a run on a file of distinct lines."""
    Path("a.txt").write_text("".join(f"line {i} of the text\n" for i in range(n_lines)))
    settings = {"source": "files", "files": ["a.txt"], "val_fraction": 0.3, "batch_size": 4, **data}
    return Config(
        model=tiny_config(max_length=16), data=DataConfig(**settings), trainer=TrainerConfig(max_steps=6)
    )


def module_of(config: Config, rank: int = 0, world_size: int = 1, global_step: int = 0) -> TextDataModule:
    """Return a data module set up as one rank of several; it reads nothing else of the Trainer."""
    module = TextDataModule(config)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        global_step=global_step,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate,
    )
    module.prepare_data()
    module.setup()
    return module


def test_train_batches_are_inputs_and_targets_in_one() -> None:
    module = module_of(config_of())
    batches = list(module.train_dataloader())
    assert len(batches) == 6
    assert all(batch.shape == (4, 17) and batch.dtype == torch.int64 for batch in batches)
    assert max(int(batch.max()) for batch in batches) < module.config.model.vocab_size


def test_train_batches_are_the_same_on_any_number_of_ranks() -> None:
    single = list(module_of(config_of(batch_size=4)).train_dataloader())
    ranks = [list(module_of(config_of(batch_size=2), rank, 2).train_dataloader()) for rank in range(2)]
    for whole, parts in zip(single, zip(*ranks, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_train_batches_of_a_resumed_run_are_those_of_an_unbroken_one() -> None:
    config = config_of()
    unbroken = list(module_of(config).train_dataloader())
    stopped = module_of(config, global_step=2)
    resumed = module_of(config, global_step=2)
    resumed.load_state_dict(stopped.state_dict())
    for expected, batch in zip(unbroken[2:], resumed.train_dataloader(), strict=True):
        assert torch.equal(batch, expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_samples_at_counts_every_rank_and_accumulated_batch(world_size: int) -> None:
    config = config_of()
    config.trainer.accumulate = 3
    module = module_of(config, world_size=world_size)
    assert module.samples_at(5) == 5 * 4 * 3 * world_size
    module.load_state_dict({"samples_seen": 1000, "step": 5})
    assert module.samples_at(5) == 1000
    assert module.samples_at(7) == 1000 + 2 * 4 * 3 * world_size


def test_state_dict_is_the_same_on_every_rank() -> None:
    config = config_of()
    assert module_of(config, 0, 2, 3).state_dict() == module_of(config, 1, 2, 3).state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 3, 500])
def test_validation_rows_are_split_over_ranks_without_duplicates(world_size: int) -> None:
    config = config_of(max_val_tokens=16 * 19)
    module = module_of(config, world_size=world_size)
    taken: list[torch.Tensor] = []
    shapes = set()
    for rank in range(min(world_size, 21)):
        module.trainer.global_rank = rank  # type: ignore[union-attr, misc]
        batches = list(module.val_dataloader())
        shapes.add(tuple(batch.shape for batch in batches))
        taken += [row for i, batch in enumerate(batches) for row in batch[: module.val_counted(i)]]
    # All ranks have the same number of batches, of the same sizes.
    assert len(shapes) == 1
    assert len(taken) == len(module.opened.val) == 19
    assert {tuple(row.tolist()) for row in taken} == {tuple(module.opened.val[i].tolist()) for i in range(19)}


def test_too_little_training_text_says_what_to_change() -> None:
    with pytest.raises(
        DataError, match=r"(\d+) training tokens, where one batch of 4 x 16 needs 65.*data\.batch_size"
    ) as caught:
        module_of(config_of(n_lines=6))
    assert "model.max_length" in str(caught.value)
    assert int(re.findall(r"\d+", str(caught.value))[0]) < 65


def test_too_little_validation_text_says_what_to_change() -> None:
    with pytest.raises(
        DataError, match=r"validation tokens, where one row of 16 needs 17;.*data\.val_fraction"
    ) as caught:
        module_of(config_of(val_fraction=0.0001))
    assert int(re.findall(r"\d+", str(caught.value))[0]) < 17


def test_fewer_validation_tokens_than_a_row_are_refused_by_the_setting() -> None:
    with pytest.raises(
        DataError, match=r"max_val_tokens=15: is less than one row of model\.max_length=16; set it to 16"
    ):
        module_of(config_of(max_val_tokens=15))
    assert len(module_of(config_of(max_val_tokens=16)).opened.val) == 1


def test_text_for_exactly_one_batch_is_enough() -> None:
    config = config_of()
    rows = len(module_of(config).opened.train)
    assert len(module_of(config_of(batch_size=rows)).opened.train) == rows
    with pytest.raises(DataError, match="too little text"):
        module_of(config_of(batch_size=rows + 1))
