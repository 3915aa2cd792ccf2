"""Weight averaging: the average itself, its validation and conversion, and exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_run import StopAt, assert_same_run

from tests.support.ddp import run_worker
from tests.support.training_runs import tiny_run, write_text
from tnnlm.checkpoints.training import load_checkpoint
from tnnlm.conversion import convert_layers
from tnnlm.data.datamodule import TextDataModule
from tnnlm.errors import ConfigError, UserError
from tnnlm.evaluation import add, parallel_nll
from tnnlm.training.callbacks.checkpoint import TrainingStopped
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

EMA = ("trainer.ema_decay=0.8", "trainer.precision=32-true")
LAST = Path("runs/demo/checkpoints/last.ckpt")


class Weights(Callback):
    """Callback that records the embedding after every step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: lightning.LightningModule, *args: Any) -> None:
        """Record a copy of the embedding."""
        self.steps.append(module.state_dict()["model.embedding.weight"].clone())


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_average_follows_the_recursion_and_does_not_replace_the_weights() -> None:
    seen = Weights()
    train(tiny_run(*EMA), extra_callbacks=[seen])
    average = seen.steps[0]
    for n, weights in enumerate(seen.steps[1:], start=1):
        decay = min(0.8, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weights
    saved = load(LAST)
    torch.testing.assert_close(saved["state_dict"]["model.embedding.weight"], average, rtol=0, atol=1e-6)
    assert torch.equal(saved["current_model_state"]["model.embedding.weight"], seen.steps[-1])
    # Frozen weights are not averaged.
    frozen = [key for key in saved["state_dict"] if "decay" in key]
    assert frozen
    assert all(torch.equal(saved["state_dict"][key], saved["current_model_state"][key]) for key in frozen)


def test_averaging_leaves_the_training_alone() -> None:
    train(tiny_run(*EMA, "name=averaged"))
    train(tiny_run(EMA[1], "name=plain"))
    averaged, plain = (load(Path(f"runs/{n}/checkpoints/last.ckpt")) for n in ("averaged", "plain"))
    for key, value in plain["state_dict"].items():
        assert torch.equal(averaged["current_model_state"][key], value), key


def test_validation_and_conversion_are_of_the_average() -> None:
    config = tiny_run(*EMA)
    train(config)
    checkpoint = load_checkpoint(Path("runs/demo/checkpoints/best.ckpt"))
    data = TextDataModule(config)
    data.setup()
    rows = torch.stack([data.opened.val[i] for i in range(len(data.opened.val))])
    row = read_metrics(Path("runs/demo/metrics.csv"))[-1]
    assert row["step"] == str(checkpoint.step)
    assert float(row["val/ppl"]) == pytest.approx(add([parallel_nll(checkpoint.model, rows)]).ppl, rel=1e-6)
    assert float(row["val/ppl_recurrent"]) == pytest.approx(float(row["val/ppl"]), rel=1e-4)
    # At every save, the attached recurrence equals that of the saved weights, bit for bit.
    for path in (checkpoint.path, LAST):
        saved = load_checkpoint(path)
        assert saved.ssm is not None
        _, layers = convert_layers(saved.model, saved.config.conversion)
        for attached, made in zip(saved.ssm.layers, layers, strict=True):
            for a, b in zip(attached, made.params, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("crash", [False, True], ids=["ctrl-c", "crash"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(accumulate: int, crash: bool) -> None:
    changes = (
        EMA[0],
        f"trainer.accumulate={accumulate}",
        "model.dropout=0.1",
        "trainer.precision=bf16-mixed",
    )
    train(tiny_run(*changes, "name=whole"))
    with pytest.raises(RuntimeError if crash else TrainingStopped):
        train(tiny_run(*changes, "name=broken"), extra_callbacks=[StopAt(10, crash)])
    run = Path("runs/broken")
    train(resumed_config(run, []), run)
    assert_same_run(Path("runs/whole"), run)
    left, right = (load(Path(f"runs/{n}/checkpoints/last.ckpt")) for n in ("whole", "broken"))
    for key, value in left["current_model_state"].items():
        assert torch.equal(value, right["current_model_state"][key]), key
    assert torch.equal(left["averaging_state"]["n_averaged"], right["averaging_state"]["n_averaged"])
    rows = [[r["val/ppl"] for r in read_metrics(Path(f"runs/{n}/metrics.csv"))] for n in ("whole", "broken")]
    assert rows[0] == rows[1]


def test_a_finished_run_resumes_from_the_weights_not_the_average() -> None:
    # Both runs validate after step 10, the last step of the first part.
    settings = (*EMA, "optim.schedule=constant", "trainer.val_every_n_steps=5")
    train(tiny_run(*settings, "name=whole"))
    train(tiny_run(*settings, "name=longer", "trainer.max_steps=10"))
    run = Path("runs/longer")
    train(resumed_config(run, ["trainer.max_steps=20"]), run)
    assert_same_run(Path("runs/whole"), run)


class SaveWithin(Callback):
    """Callback that saves in the middle of a validation, as a signal may request."""

    def on_validation_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Save while the averaged weights are swapped in."""
        trainer.save_checkpoint("within.ckpt")

    def on_validation_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Save at the same step, after the validation."""
        trainer.save_checkpoint("after.ckpt")


def test_a_save_within_a_validation_holds_the_same() -> None:
    train(tiny_run(*EMA, "trainer.max_steps=8"), extra_callbacks=[SaveWithin()])
    within, after = load(Path("within.ckpt")), load(Path("after.ckpt"))
    for part in ("state_dict", "current_model_state"):
        for key, value in after[part].items():
            assert torch.equal(within[part][key], value), (part, key)
    for a, b in zip(within["tnnlm"]["ssm"]["layers"], after["tnnlm"]["ssm"]["layers"], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a if isinstance(a[key], torch.Tensor))


@pytest.mark.parametrize("change", ["trainer.precision=bf16-true", "trainer.strategy=fsdp"])
def test_what_can_not_be_averaged_is_refused(change: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.ema_decay=0\.8: .*use trainer\.(precision|strategy)="):
        train(tiny_run(EMA[0], change))
    assert not Path("runs").exists()


def test_resume_can_not_switch_averaging() -> None:
    train(tiny_run(*EMA, "trainer.max_steps=4"))
    with pytest.raises(UserError, match="can't be changed on resume"):
        resumed_config(Path("runs/demo"), ["trainer.ema_decay=null"])


def test_two_ranks_average_as_one_process() -> None:
    write_text()
    common = (*EMA, "trainer.max_steps=8", "trainer.sample_tokens=0")
    run_worker(*common, "data.batch_size=4", "name=one")
    run_worker(*common, "data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp", "name=two")
    one, two = (load(Path(f"runs/{name}/checkpoints/last.ckpt")) for name in ("one", "two"))
    for part in ("state_dict", "current_model_state"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=1e-5)
