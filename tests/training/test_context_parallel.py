"""Context parallelism on 2, 3 and 4 processes over gloo, compared with one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import free_port, run_processes, run_ranks
from tests.support.training_runs import working_in, write_text
from tnnlm.config.loader import load_config
from tnnlm.errors import ConfigError
from tnnlm.kernels import build_kernel
from tnnlm.kernels.rtf import RTFConfig
from tnnlm.kernels.tno import TNOConfig
from tnnlm.modules import ContextConv, LongConv
from tnnlm.ops.context import ContextGroup
from tnnlm.training.context_parallel import own_rows, own_tokens
from tnnlm.training.estimate import estimate_run
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.memory import estimate_memory

CHANNELS = 7
"""Number of channels of the convolutions, which 3 processes can't divide evenly."""
COMMON = (
    "data.max_val_tokens=544",  # 17 rows, an odd number
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.val_every_n_steps=10",
    "trainer.sample_tokens=3",
    "optim.schedule=constant",
    "optim.warmup_steps=5",
)


def convolve(rank: int, port: int) -> None:
    """Compare the outputs and gradients of one of 3 processes with those of the whole convolution."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    group = ContextGroup(rank, 3, dist.new_group([0, 1, 2]))
    for settings in (
        TNOConfig(rpe_dim=8, rpe_layers=1),
        RTFConfig(name="rtf", state_size=4, init="xavier", constraint="montel"),
    ):
        torch.manual_seed(0)
        whole = LongConv(build_kernel(settings, CHANNELS, 15).double())
        split = copy.deepcopy(ContextConv(copy.deepcopy(whole.kernel), group))
        x = torch.randn(2, 15, CHANNELS, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 15, CHANNELS, dtype=torch.float64)
        own = slice(5 * rank, 5 * rank + 5)
        shard = x.detach()[:, own].clone().requires_grad_()
        expected, found = whole(x), split(shard)
        (expected * weight).sum().backward()
        (found * weight[:, own]).sum().backward()
        torch.testing.assert_close(found, expected[:, own], rtol=0, atol=1e-12)
        torch.testing.assert_close(shard.grad, x.grad[:, own], rtol=0, atol=1e-12)
        for mine, one in zip(split.parameters(), whole.parameters(), strict=True):
            if one.requires_grad:
                dist.all_reduce(mine.grad)
                torch.testing.assert_close(mine.grad, one.grad, rtol=0, atol=1e-11)
        assert split.state_dict().keys() == whole.state_dict().keys()


def test_split_convolution_equals_the_whole_one() -> None:
    port = free_port()
    assert run_processes(convolve, [(rank, port) for rank in range(3)]) == [0] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the text, its cache, and a run on one process as the reference."""
    with working_in(tmp_path_factory.mktemp("context")) as path:
        write_text()
        run_ranks(1, *COMMON, "trainer.max_steps=25", "name=one")
        yield path


def rows(name: str, column: str) -> list[float]:
    return [float(r[column]) for r in read_metrics(Path(f"runs/{name}/metrics.csv")) if r[column]]


@pytest.mark.parametrize(
    ("ranks", "size", "words"),
    [(2, 2, ()), (4, 4, ()), (4, 2, ("trainer.recompute=true", "data.batch_size=1", "trainer.accumulate=2"))],
    ids=["2", "4", "2x2"],
)
def test_shared_sequences_train_like_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, size: int, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TNNLM_CACHE", str(folder / "cache"))
    name = f"split{ranks}of{size}"
    split = (f"trainer.context_parallel={size}", "trainer.max_steps=20", f"name={name}")
    held = run_ranks(ranks, *COMMON, *split, *words)
    assert len({h["gradients"][-1] for h in held}) == 1  # DDP has reduced them
    assert all(h["rows"] == held[0]["rows"] for h in held[:size])
    assert rows(name, "train/loss") == pytest.approx(rows("one", "train/loss")[:20], abs=1e-5, rel=0)
    for column in ("val/loss", "val/ppl", "val/bpb", "val/ppl_recurrent"):
        assert rows(name, column) == pytest.approx(rows("one", column)[:2], rel=1e-5)
    if ranks == 2:  # its checkpoint is an ordinary one
        run_ranks(1, "trainer.context_parallel=1", "trainer.max_steps=25", resume=f"runs/{name}")
        assert rows(name, "train/loss") == pytest.approx(rows("one", "train/loss"), abs=1e-5, rel=0)
        one, two = (
            torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True) for run in ("one", name)
        )
        assert one["TextDataModule"] == two["TextDataModule"]
        assert one["state_dict"].keys() == two["state_dict"].keys()


def test_shards_overlap_in_one_token() -> None:
    batch = torch.arange(2 * 13).view(2, 13)
    shards = [own_tokens(batch, ContextGroup(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([shard[:, :-1] for shard in shards], 1), batch[:, :-1])
    assert torch.equal(torch.cat([shard[:, 1:] for shard in shards], 1), batch[:, 1:])
    assert own_tokens(batch, ContextGroup()).equal(batch)


def test_rows_are_counted_once() -> None:
    batch = torch.arange(5)[:, None]
    parts = [own_rows(batch, 4, ContextGroup(rank, 3)) for rank in range(3)]
    assert sorted(int(row) for part, counted in parts for row in part[:counted]) == [0, 1, 2, 3]
    whole, counted = own_rows(batch, None, ContextGroup())
    assert whole.equal(batch)
    assert counted == 5


@pytest.mark.parametrize(
    "words",
    [
        ("task=masked",),
        ("model.block=hyena", "model.expand=1"),
        ("trainer.strategy=fsdp",),
        ("trainer.compile=true",),
        ("model.max_length=63",),
        ("model.d_model=1", "model.expand=1"),
    ],
)
def test_unsupported_settings_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.context_parallel=2: "):
        load_config(None, [*words, "trainer.context_parallel=2"])


def test_number_of_devices_must_be_a_multiple() -> None:
    words = ["trainer.accelerator=cpu", "trainer.devices=3", "trainer.context_parallel=2"]
    with pytest.raises(ConfigError, match="must divide the number of devices, 3"):
        estimate_run(load_config(None, words))


def test_dry_run_counts_the_share_of_a_device() -> None:
    words = ["trainer.accelerator=cuda", "trainer.devices=4"]
    configs = [load_config(None, [*words, f"trainer.context_parallel={size}"]) for size in (1, 4)]
    whole, quarter = (estimate_memory(config) for config in configs)
    assert quarter.step - quarter.state == pytest.approx((whole.step - whole.state) / 4, rel=0.1)
    one, four = (estimate_run(config) for config in configs)
    assert one.tokens_per_update == 4 * four.tokens_per_update
