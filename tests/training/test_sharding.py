"""Training on 1, 2 and 4 ranks with DDP and FSDP, compared with training on one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.support.models import tiny_config
from tests.support.ranks import run_ranks
from tests.support.training_runs import working_in, write_text
from tnnlm.checkpoints.training import from_attached, load_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.conversion import convert_model
from tnnlm.evaluation import parallel_nll, recurrent_nll
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import in_recurrent_form
from tnnlm.training.estimate import estimate_run
from tnnlm.training.fsdp import shard, shard_dimension
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.memory import estimate_memory

# 4 rows per step on any number of ranks, and 17 validation rows, which no number of ranks divides.
COMMON = (
    "data.max_val_tokens=544",
    "trainer.precision=32-true",
    "trainer.max_steps=50",
    "trainer.val_every_n_steps=25",
    "trainer.log_every_n_steps=1",
    "trainer.sample_tokens=3",
)


def words(strategy: str, ranks: int) -> tuple[str, ...]:
    """Return the settings of one run."""
    return (
        *COMMON,
        f"trainer.strategy={strategy}",
        f"data.batch_size={4 // ranks}",
        f"name={strategy}{ranks}",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the text, its cache, and a run on one process as the reference."""
    with working_in(tmp_path_factory.mktemp("ranks")) as path:
        write_text()
        run_ranks(1, *words("auto", 1))
        yield path


@pytest.fixture(autouse=True)
def _inside(folder: Path) -> Iterator[None]:
    with working_in(folder):
        yield


def losses(name: str) -> list[float]:
    return [float(r["train/loss"]) for r in read_metrics(Path(f"runs/{name}/metrics.csv")) if r["train/loss"]]


def scores(name: str) -> list[dict[str, float]]:
    keys = ("step", "val/loss", "val/ppl", "val/bpb", "val/ppl_recurrent")
    rows = [row for row in read_metrics(Path(f"runs/{name}/metrics.csv")) if row["val/ppl"]]
    return [{key: float(row[key]) for key in keys} for row in rows]


def converted(name: str, file: str = "last.ckpt") -> dict[str, Any]:
    checkpoint = load_checkpoint(Path(f"runs/{name}/checkpoints/{file}"))
    return from_attached(checkpoint).model.state_dict()


def state(name: str) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)
    return checkpoint


def assert_same_model(name: str, other: str, file: str = "last.ckpt") -> None:
    """Assert that weights and recurrences are equal to 1e-6."""
    mine, one = converted(name, file), converted(other, file)
    assert mine.keys() == one.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_any_number_of_ranks_equals_one_process(strategy: str, ranks: int) -> None:
    name = f"{strategy}{ranks}"
    held = run_ranks(ranks, *words(strategy, ranks))
    assert [h["world_size"] for h in held] == [ranks] * ranks
    for key in ("train/loss", "val/ppl", "val/bpb"):
        assert len({h["metrics"][key] for h in held}) == 1
    assert len(losses(name)) == 50
    assert losses(name) == pytest.approx(losses("auto1"), abs=1e-5, rel=0)
    assert len(scores(name)) == 2
    for mine, one in zip(scores(name), scores("auto1"), strict=True):
        assert mine == pytest.approx(one, rel=1e-5)
    assert_same_model(name, "auto1")
    assert_same_model(name, "auto1", "best.ckpt")
    assert Path(f"runs/{name}/samples.txt").read_text().count("--- step") == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_reduced_once_a_step(strategy: str) -> None:
    name = f"{strategy}_twice"
    held = run_ranks(
        2,
        *words(strategy, 2),
        "trainer.accumulate=2",
        "data.batch_size=1",
        "trainer.max_steps=3",
        "trainer.sample_tokens=0",
        f"name={name}",
    )
    for step in range(3):
        first, second = zip(*(h["gradients"][2 * step : 2 * step + 2] for h in held), strict=True)
        assert set(first) == {None} if strategy == "fsdp" else len(set(first)) == 2
        assert len(set(second)) == 1
    # Each step has the same rows as without accumulation.
    assert losses(name) == pytest.approx(losses("auto1")[:3], abs=1e-5, rel=0)


def test_resume_works_with_another_strategy_and_number_of_ranks() -> None:
    run_ranks(2, *words("ddp", 2), "trainer.max_steps=5", "name=moved")
    run = "runs/moved"
    run_ranks(4, "trainer.strategy=fsdp", "data.batch_size=1", "trainer.max_steps=10", resume=run)
    run_ranks(1, "trainer.strategy=auto", "data.batch_size=4", "trainer.max_steps=50", resume=run)
    assert losses("moved") == pytest.approx(losses("auto1"), abs=1e-5, rel=0)
    assert_same_model("moved", "auto1")
    mine, one = state("moved"), state("auto1")
    assert mine["TextDataModule"] == one["TextDataModule"]
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (mine, one)]
    assert moments[0].keys() == moments[1].keys()
    for index, values in moments[0].items():
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(values[key], moments[1][index][key], rtol=1e-3, atol=1e-6)


def test_a_short_first_dimension_is_not_sharded() -> None:
    for shape, dim in (((7, 64, 16), 1), ((8, 64, 16), None), ((7, 3), None), ((7,), None)):
        found = shard_dimension(torch.nn.Parameter(torch.empty(shape)), ranks=8)
        assert (None if found is None else found.dim) == dim


@pytest.mark.parametrize(("kernel", "method"), [("rtf", "companion"), ("sgconv", "multirate")])
def test_other_kernels_are_sharded_and_converted(script: Any, kernel: str, method: str) -> None:
    kind = (f"model.kernel.name={kernel}", f"conversion.method={method}")
    if kernel == "sgconv":
        kind += ("model.kernel.kernel_dim=8",)  # three scales, which two ranks don't divide
    for name, (strategy, ranks) in {"one": ("auto", 1), "two": ("fsdp", 2)}.items():
        run_ranks(ranks, *words(strategy, ranks), *kind, "trainer.max_steps=5", f"name={kernel}_{name}")
    assert_same_model(f"{kernel}_one", f"{kernel}_two")
    result = script("convert", f"runs/{kernel}_two", "--method", method, "--verify")
    assert result.code == 0, result.err
    assert Path(f"runs/{kernel}_two/converted/model.safetensors").is_file()


@pytest.mark.parametrize("block", ["tnn", "hyena", "s4", "s4_glu"])
def test_every_block_is_validated_in_both_forms_while_it_is_sharded(block: str) -> None:
    expand = 3 if block == "tnn" else 1
    model = CausalLM(tiny_config(block=block, expand=expand)).eval()
    convs = [layer.mixer.conv for layer in convert_model(model).layers]
    rows = torch.randint(300, (2, 13))
    expected = parallel_nll(model, rows)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard(model, init_device_mesh("cpu", (1,)))
        found = parallel_nll(model, rows)
        with in_recurrent_form(model, convs):
            recurrent = recurrent_nll(model, rows, 5)
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(expected, rel=1e-6)
    assert recurrent == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 3])
def test_mixed_precision_and_fewer_rows_than_ranks(ranks: int) -> None:
    run_ranks(
        ranks,
        *words("fsdp", 1),
        "trainer.precision=bf16-mixed",
        "data.max_val_tokens=64",
        "data.batch_size=3",
        "trainer.max_steps=4",
        "trainer.val_every_n_steps=4",
        f"name=mixed{ranks}",
    )
    assert (
        abs(scores(f"mixed{ranks}")[0]["val/ppl_recurrent"] / scores(f"mixed{ranks}")[0]["val/ppl"] - 1)
        < 1e-4
    )


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "16-mixed"])
def test_precisions_that_can_not_be_sharded_are_refused(script: Any, precision: str) -> None:
    result = script("train", f"trainer.precision={precision}", "trainer.strategy=fsdp", "name=refused")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert f"trainer.precision={precision}" in result.err
    assert not Path("runs/refused").exists()


def test_dry_run_counts_the_share_of_a_device() -> None:
    configs = [
        load_config(None, ["trainer.accelerator=cpu", f"trainer.strategy={name}", f"trainer.devices={n}"])
        for name, n in (("ddp", 8), ("fsdp", 8), ("fsdp", 64))
    ]
    memory = [estimate_memory(config).peak for config in configs]
    params = estimate_run(configs[0]).params
    assert memory[0] > memory[1] > memory[2]
    assert memory[1] - memory[2] == 16 * params // 8 - 16 * params // 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fsdp_on_gpus(script: Any) -> None:
    n = torch.cuda.device_count()
    run_ranks(
        n,
        *words("fsdp", 1),
        "trainer.accelerator=gpu",
        "trainer.precision=bf16-mixed",
        "name=gpus",
        "trainer.max_steps=8",
        "trainer.val_every_n_steps=4",
    )
    row = scores("gpus")[-1]
    assert row["val/ppl_recurrent"] == pytest.approx(row["val/ppl"], rel=1e-3)
    assert script("convert", "runs/gpus", "--verify").code == 0
