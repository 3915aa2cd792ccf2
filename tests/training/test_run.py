"""Complete runs: the loss decreases on real text, all files are written, and resuming is bitwise exact."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.support.training_runs import assert_same_run, tiny_run
from tests.support.unchanged import files_under
from tnnlm.checkpoints.training import load_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.errors import UserError
from tnnlm.training.callbacks.checkpoint import TrainingStopped
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train


class Recorder(Callback):
    """Callback that records the training batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the step and a fingerprint of the batch."""
        self.batches.append((trainer.global_step, int((batch * torch.arange(batch.shape[1])).sum())))


class StopAt(Recorder):
    """Callback that sends SIGINT or raises an exception in the middle of a step."""

    def __init__(self, step: int, crash: bool) -> None:
        super().__init__()
        self.step = step
        self.crash = crash
        self.done = False

    def on_before_zero_grad(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Stop or crash in the middle of a step."""
        if trainer.global_step == self.step - 1 and not self.done:
            self.done = True
            if self.crash:
                raise RuntimeError("crash")
            os.kill(os.getpid(), signal.SIGINT)


def test_train_lowers_the_loss_on_real_text_and_writes_everything() -> None:
    summary = train(tiny_run("trainer.max_steps=80", "optim.lr=1e-2", "optim.warmup_steps=5", "name=learn"))
    run = Path("runs/learn")
    rows = read_metrics(run / "metrics.csv")
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    val = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert losses[-1] < losses[0] - 1
    assert val[-1] < 5.0 < 5.99 < torch.tensor(400.0).log() + 1e-2  # a uniform prediction has a loss of 5.99
    assert abs(summary["val/ppl_gap"]) <= 1e-4
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["tokens_seen"] == 80 * 4 * 32
    assert {"val/ppl", "val/bpb", "val/ppl_recurrent", "params", "train_seconds"} <= set(summary)
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "data.json",
        "tokenizer.json",
        "metrics.csv",
        "summary.json",
        "samples.txt",
        "loss.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    } <= written
    assert any(name.startswith("tensorboard/events") for name in written)
    assert (run / "samples.txt").read_text().count("--- step") == 10
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(run / "config.yaml").trainer.max_steps == 80


def test_checkpoint_loads_with_its_recurrence() -> None:
    train(tiny_run("trainer.max_steps=8"))
    checkpoint = load_checkpoint(Path("runs/demo/checkpoints/best.ckpt"))
    assert checkpoint.step == 8
    assert checkpoint.ssm is not None
    assert checkpoint.ssm.method == "etsc"
    assert len(checkpoint.ssm.layers) == 2


def test_the_best_checkpoint_is_of_the_best_validation() -> None:
    # At this learning rate, the model learns first and diverges later.
    train(tiny_run("trainer.max_steps=24", "optim.lr=1", "optim.warmup_steps=20", "optim.grad_clip=0"))
    rows = [row for row in read_metrics(Path("runs/demo/metrics.csv")) if row["val/ppl"]]
    best = min(rows, key=lambda row: float(row["val/ppl"]))
    assert best["step"] != "24"
    assert load_checkpoint(Path("runs/demo/checkpoints/best.ckpt")).step == int(best["step"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("crash", [False, True], ids=["ctrl-c", "crash"])
def test_resume_is_exact(accumulate: int, crash: bool) -> None:
    changes = (f"trainer.accumulate={accumulate}", "model.dropout=0.1", "trainer.precision=bf16-mixed")
    whole, broken = Recorder(), StopAt(10, crash)
    train(tiny_run(*changes, "name=whole"), extra_callbacks=[whole])
    with pytest.raises(RuntimeError if crash else TrainingStopped):
        train(tiny_run(*changes, "name=broken"), extra_callbacks=[broken])
    # After a crash, training resumes from the last periodic checkpoint and repeats the steps after it.
    saved = 7 if crash else 10
    before = [batch for batch in broken.batches if batch[0] < saved]
    broken.batches = []
    run = Path("runs/broken")
    train(resumed_config(run, []), run, extra_callbacks=[broken])
    assert before + broken.batches == whole.batches
    assert_same_run(Path("runs/whole"), run)


@pytest.mark.parametrize("method", ["balanced", "auto", "window"])
def test_validation_and_checkpoints_take_any_method(method: str) -> None:
    summary = train(tiny_run("trainer.max_steps=8", f"conversion.method={method}"))
    # The tolerance on the taps is 1e-3.
    assert abs(summary["val/ppl_gap"]) <= 1e-3
    checkpoint = load_checkpoint(Path("runs/demo/checkpoints/best.ckpt"))
    assert checkpoint.ssm is not None
    assert checkpoint.ssm.method == method


def test_a_run_is_never_overwritten() -> None:
    for _ in range(3):
        train(tiny_run("trainer.max_steps=2", "trainer.sample_tokens=0"))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2", "demo-3"]
    assert all(len(read_metrics(run / "metrics.csv")) == 2 for run in Path("runs").iterdir())


def test_the_last_step_is_always_validated() -> None:
    train(tiny_run("trainer.max_steps=11"))
    rows = read_metrics(Path("runs/demo/metrics.csv"))
    assert [row["step"] for row in rows if row["val/ppl"]] == ["8", "11"]


def test_resume_refuses_what_would_be_another_run() -> None:
    train(tiny_run("trainer.max_steps=4"))
    run = Path("runs/demo")
    for change in ("model.d_model=64", "seed=1", "name=x"):
        with pytest.raises(UserError, match="can't be changed on resume"):
            resumed_config(run, [change])
    with pytest.raises(UserError, match="is complete at step 4"):
        train(resumed_config(run, []), run)
    with pytest.raises(UserError, match="its data has changed"):
        train(resumed_config(run, ["trainer.max_steps=8", "data.val_fraction=0.2"]), run)
    train(resumed_config(run, ["trainer.max_steps=6"]), run)
    assert load_checkpoint(run / "checkpoints/last.ckpt").step == 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model={d_model: 64}", "model.d_model=64"),
        ("model={kernel: {decay: 0.5}}", "model.kernel.decay=0.5"),
        ("model.kernel={name: rtf}", "model.kernel."),
        ("trainer={ema_decay: 0.9}", "trainer.ema_decay=0.9"),
        ("data={mask_fraction: 0.5}", "data.mask_fraction=0.5"),
        ("seed=1", "seed=1"),
    ],
)
def test_a_fixed_setting_is_refused_by_name_however_it_is_given(change: str, named: str) -> None:
    train(tiny_run("trainer.max_steps=2"))
    run = Path("runs/demo")
    before = files_under(run)
    with pytest.raises(UserError, match=f"{re.escape(named)}.*can't be changed on resume"):
        resumed_config(run, [change])
    assert files_under(run) == before


def test_a_moved_run_resumes_under_its_old_and_its_new_name() -> None:
    train(tiny_run("trainer.max_steps=2"))
    run = Path("elsewhere/mine")
    run.parent.mkdir()
    Path("runs/demo").rename(run)
    for words in ([], ["name=demo"], ["name=mine"], ["runs_dir=runs"], ["optim.lr=1e-4"]):
        config = resumed_config(run, words)
        assert (config.name, config.runs_dir) == ("mine", "elsewhere")
    for word in ("name=other", "runs_dir=other"):
        with pytest.raises(UserError, match="can't be changed on resume"):
            resumed_config(run, [word])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.accelerator=cuda", "^trainer.accelerator=cuda: PyTorch finds no GPU; set"),
        ("trainer.max_steps=3", "trainer.max_steps=3: .* is at step 4 already; set it to 4 or more"),
        ("trainer.wandb=x", "wandb"),
        ("data.files=other.txt", "its data has changed"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_refused_resume_changes_no_file(change: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    Path("other.txt").write_text("another text " * 3000)
    train(tiny_run("trainer.max_steps=4", "checkpoint.every_n_steps=2"))
    run = Path("runs/demo")
    (run / "summary.json").unlink()  # as if killed at the end
    for source in (Path("checkpoints/last.ckpt"), Path("checkpoints/previous.ckpt")):
        if change == "trainer.max_steps=3" and source.name != "last.ckpt":
            continue
        before = files_under(run)
        with pytest.raises(UserError, match=message):
            train(resumed_config(run, [change]), run, source=source)
        assert files_under(run) == before


def test_a_resume_that_fails_in_its_first_step_changes_nothing_that_it_resumes_from() -> None:
    class OutOfMemory(Callback):
        def on_before_backward(self, *args: Any) -> None:
            raise RuntimeError("CUDA out of memory")

    train(tiny_run("trainer.max_steps=9"))
    run = Path("runs/demo")
    before = files_under(run)
    changes = ["trainer.max_steps=12", "data.batch_size=64"]
    for source in ("last", "previous"):
        with pytest.raises(RuntimeError, match="out of memory"):
            train(
                resumed_config(run, changes),
                run,
                [OutOfMemory()],
                source=Path(f"checkpoints/{source}.ckpt"),
            )
        after = {path: value for path, value in files_under(run).items() if "tensorboard" not in path}
        assert after == {path: value for path, value in before.items() if "tensorboard" not in path}
    train(resumed_config(run, ["trainer.max_steps=12"]), run)
    assert load_config(run / "config.yaml").trainer.max_steps == 12
    assert load_config(run / "config.yaml").data.batch_size == 4


def test_resume_continues_time_and_tokens() -> None:
    first = train(tiny_run("trainer.max_steps=4"))
    run = Path("runs/demo")
    second = train(resumed_config(run, ["trainer.max_steps=8"]), run)
    assert second["tokens_seen"] == 2 * first["tokens_seen"]
    assert second["train_seconds"] > first["train_seconds"]


def test_too_little_text_leaves_no_run() -> None:
    Path("text.txt").write_text("Hello, world.\n" * 3)
    with pytest.raises(UserError, match="too little text"):
        train(tiny_run())
    assert not Path("runs").exists()


def test_failed_conversion_costs_the_recurrence_not_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no poles today")

    monkeypatch.setattr("tnnlm.training.callbacks.recurrences.convert_kernels", fail)
    monkeypatch.setattr("tnnlm.training.tasks.convert_kernels", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = train(tiny_run("trainer.max_steps=8"))
    assert any("no poles today" in str(warning.message) for warning in caught)
    assert "val/ppl_recurrent" not in summary
    assert summary["val/ppl"] > 1
    assert load_checkpoint(Path("runs/demo/checkpoints/last.ckpt")).ssm is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_every_precision_policy_keeps_the_two_forms_together(precision: str) -> None:
    summary = train(tiny_run(f"trainer.precision={precision}", "trainer.max_steps=8"))
    # Under bf16-true, both forms have bf16 projections, so only their rounding differs.
    assert abs(summary["val/ppl_gap"]) <= (2e-2 if precision == "bf16-true" else 1e-4)
    weights = torch.load("runs/demo/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    kernels = {key: value for key, value in weights.items() if ".kernel." in key}
    assert kernels
    assert all(torch.finfo(value.dtype).bits >= 32 for value in kernels.values())


def test_a_resumed_run_says_how_to_replace_the_converted_model(script: Any) -> None:
    train(tiny_run("name=tiny", "trainer.max_steps=4"))
    Path("runs/tiny/converted").mkdir()
    done = script("train", "--resume", "tiny", "trainer.max_steps=5")
    assert done.code == 0, done.err
    assert "runs/tiny --force && " in done.out
