"""Steps with gradients that are not finite are skipped and counted, and a diverged model is never saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tests.support.training_runs import assert_same_run, tiny_run
from tnnlm.errors import UserError
from tnnlm.training.callbacks.checkpoint import TrainingDiverged
from tnnlm.training.lit_module import LitModel
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.optim import build_optimizer
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

LAST, BEST = (Path("runs/demo/checkpoints") / name for name in ("last.ckpt", "best.ckpt"))


class Poison(Callback):
    """Callback that makes gradients NaN at some steps, and records weights and moments around every step."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set one gradient to NaN."""
        self.before.append(_state(trainer, pl_module))
        if trainer.global_step in self.steps:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.view(-1)[0] = torch.nan

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any
    ) -> None:
        """Record the state after the step."""
        self.after.append(_state(trainer, pl_module))


def _state(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Tensor:
    """Return weights, moments and the step counts of Adam."""
    state = [value for entry in trainer.optimizers[0].state.values() for value in entry.values()]
    tensors = [*pl_module.parameters(), *state]
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def plain_optimizer(model: Any, config: Any, fused: bool = True) -> Any:
    return build_optimizer(model, config, fused=False)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr("tnnlm.training.lit_module.build_optimizer", plain_optimizer)
    poison = Poison(3, 4, 9)
    train(tiny_run(), extra_callbacks=[poison])
    for step, (before, after) in enumerate(zip(poison.before, poison.after, strict=True)):
        assert torch.equal(before, after) if step in (3, 4, 9) else not torch.equal(before, after), step
        assert after.isfinite().all()
    rows = [row for row in read_metrics(Path("runs/demo/metrics.csv")) if row["train/loss"]]
    assert [(row["step"], float(row["train/skipped"])) for row in rows] == [
        ("5", 2), ("10", 3), ("15", 3), ("20", 3),
    ]  # fmt: skip
    # A skipped step counts as a step of the learning-rate schedule.
    train(tiny_run("name=clean"))
    clean = [row["train/lr"] for row in read_metrics(Path("runs/clean/metrics.csv")) if row["train/loss"]]
    assert [row["train/lr"] for row in rows] == clean


def test_training_without_a_bad_step_is_as_without_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_run("name=guarded", "trainer.spike_factor=5"))
    skip_steps = "tnnlm.training.callbacks.skip_steps"
    monkeypatch.setattr(f"{skip_steps}.SkipBadSteps.on_before_optimizer_step", lambda *args: None)
    train(tiny_run("name=bare"))
    assert_same_run(Path("runs/guarded"), Path("runs/bare"))


def test_too_many_in_a_row_stop_the_run_and_report_the_last_good_checkpoint() -> None:
    poison = Poison(2, 3, 5, *range(9, 20))
    with pytest.raises(TrainingDiverged, match="3 steps in a row were skipped") as caught:
        train(tiny_run("trainer.max_skipped=3"), extra_callbacks=[poison])
    assert len(poison.after) in (11, 12)  # steps 9 to 11
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(rf"stopped after step 12: .* {LAST} of step 7; .*--resume runs/demo", message)
    run = Path("runs/demo")
    train(resumed_config(run, ["optim.lr=1e-4"]), run)
    assert torch.load(LAST, weights_only=True)["global_step"] == 20


def test_a_loss_spike_is_skipped_if_enabled() -> None:
    class Noise(Callback):
        def on_train_batch_start(
            self, trainer: lightning.Trainer, pl_module: Any, batch: Tensor, batch_idx: int
        ) -> None:
            if trainer.global_step in (30, 31):
                batch.random_(0, 400)

    words = ("trainer.max_steps=40", "optim.lr=1e-2", "optim.warmup_steps=5")
    skipped = {}
    for factor in (0, 1.1):
        train(
            tiny_run(*words, f"trainer.spike_factor={factor}", f"name=f{factor}"), extra_callbacks=[Noise()]
        )
        skipped[factor] = read_metrics(Path(f"runs/f{factor}/metrics.csv"))[-2]["train/skipped"]
    assert skipped == {0: "0.0", 1.1: "2.0"}


def test_a_model_that_is_not_finite_is_never_saved() -> None:
    class Ruin(Callback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == self.step:
                with torch.no_grad():
                    next(pl_module.parameters()).view(-1)[0] = torch.inf

    # The model diverges before a save, before a validation, and before the end.
    for step, last, best in ((14, 7, 8), (16, 14, 8), (20, 14, 16)):
        name = f"ruined{step}"
        with pytest.raises(TrainingDiverged, match="weights are no longer finite"):
            train(tiny_run(f"name={name}"), extra_callbacks=[Ruin(step)])
        for file, expected in (("last.ckpt", last), ("best.ckpt", best)):
            checkpoint = torch.load(f"runs/{name}/checkpoints/{file}", weights_only=True)
            assert checkpoint["global_step"] == expected, (step, file)
            assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_resume_is_exact_with_skipped_steps() -> None:
    words = ("trainer.spike_factor=1.02", "trainer.max_skipped=15")

    class Crash(Poison):
        def on_before_zero_grad(self, trainer: lightning.Trainer, *args: Any) -> None:
            if trainer.global_step == 10:
                raise RuntimeError("crash")

    train(tiny_run(*words, "name=whole"), extra_callbacks=[Poison(2, 5, 12)])
    with pytest.raises(RuntimeError, match="crash"):
        train(tiny_run(*words, "name=broken"), extra_callbacks=[Crash(2, 5, 12)])
    run = Path("runs/broken")
    train(resumed_config(run, []), run, extra_callbacks=[Poison(2, 5, 12)])
    assert_same_run(Path("runs/whole"), run)
    guards = [
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["callbacks"]["Guard"]
        for name in ("whole", "broken")
    ]
    assert guards[0] == guards[1]
    assert guards[0]["skipped"] >= 3


def test_skipping_can_be_switched_off() -> None:
    with pytest.raises(UserError, match="weights are no longer finite"):
        train(tiny_run("trainer.skip_nonfinite=false"), extra_callbacks=[Poison(2)])
    assert torch.load(LAST, weights_only=True)["global_step"] == 0
    assert not BEST.exists()


def test_step_loss_is_the_mean_over_the_step() -> None:
    module = LitModel(tiny_run("trainer.accumulate=2"))
    module._losses = [torch.tensor(float(value)) for value in (1, 2)]
    assert float(module.step_loss()) == 1.5
