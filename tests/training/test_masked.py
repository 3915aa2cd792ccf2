"""Runs with task=masked: they learn, resume exactly, validate with fixed masks, and are not convertible."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from plot_run import final_figures, plot_runs, read_run
from tests.support.training_runs import SETTINGS, assert_same_run, tiny_run, write_text
from tnnlm.checkpoints.training import load_encoder
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.errors import UserError
from tnnlm.evaluation import add, masked_nll
from tnnlm.models.encoders import MaskedLM
from tnnlm.tokenizer import train_bpe
from tnnlm.training.callbacks.checkpoint import TrainingStopped
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train


def masked_run(*overrides: str) -> Config:
    return tiny_run("task=masked", *overrides)


class Watcher(Callback):
    """Callback that records the masked batches, and stops once at the beginning of a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.trained: list[tuple[int, list[int]]] = []
        self.validated: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the step and a fingerprint of the training batch."""
        self.trained.append((trainer.global_step, [int(part.sum()) for part in batch]))

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, *args: Any
    ) -> None:
        """Record a fingerprint of the validation batch."""
        self.validated.append([int(part.sum()) for part in batch])

    def on_before_zero_grad(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Stop in the middle of a step."""
        if trainer.global_step == self.stop_at:
            self.stop_at = None
            os.kill(os.getpid(), signal.SIGINT)


def test_train_learns_to_predict_masked_tokens_and_writes_all_files() -> None:
    summary = train(masked_run("trainer.max_steps=150", "trainer.val_every_n_steps=50", "optim.lr=1e-2"))
    run = Path("runs/demo")
    assert summary["val/ppl_masked"] < 200  # a uniform prediction has a perplexity of 400
    assert summary["val/ppl_masked"] == pytest.approx(math.exp(summary["val/loss"]))
    assert summary == json.loads((run / "summary.json").read_text())
    rows = read_metrics(run / "metrics.csv")
    assert not any("val/ppl" in row or "val/bpb" in row for row in rows)
    assert [row["step"] for row in rows if row["val/ppl_masked"]] == ["50", "100", "150"]
    assert all(float(rows[-1][f"kernel/{name}/0"]) > 0 for name in ("length", "order"))
    assert not (run / "samples.txt").exists()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    curves = read_run(run)
    assert final_figures(curves)["val/ppl_masked"] == f"{summary['val/ppl_masked']:.4f}"
    plot_runs([curves], run / "run.png")


def test_checkpoint_loads_and_scores_as_in_validation() -> None:
    config = masked_run("trainer.max_steps=8", "trainer.precision=32-true")
    summary = train(config)
    read = load_encoder(Path("runs/demo/checkpoints/best.ckpt"))
    assert isinstance(read.model, MaskedLM)
    assert read.tokenizer.id_of("<|mask|>") == 1
    # In a document, the mask token is plain text.
    assert read.tokenizer.decode(read.tokenizer.encode("<|mask|>")) == "<|mask|>"
    data = TextDataModule(config)
    data.setup()
    batch = torch.utils.data.default_collate([data.opened.val[i] for i in range(len(data.opened.val))])
    assert add([masked_nll(read.model, batch)]).ppl == pytest.approx(summary["val/ppl_masked"], rel=1e-5)


@pytest.mark.parametrize("ema", [False, True])
def test_resume_is_exact(ema: bool) -> None:
    changes = ["model.dropout=0.1", "trainer.accumulate=2", *(["trainer.ema_decay=0.9"] if ema else [])]
    whole, broken = Watcher(), Watcher(stop_at=9)
    train(masked_run(*changes, "name=whole"), extra_callbacks=[whole])
    with pytest.raises(TrainingStopped):
        train(masked_run(*changes, "name=broken"), extra_callbacks=[broken])
    run = Path("runs/broken")
    train(resumed_config(run, []), run, extra_callbacks=[broken])
    assert broken.trained == whole.trained
    assert_same_run(Path("runs/whole"), run)


def test_masks_are_fixed_in_validation_and_vary_in_training() -> None:
    seen = Watcher()
    train(masked_run("data.max_val_tokens=200", "trainer.max_steps=24"), extra_callbacks=[seen])
    per_validation = len(seen.validated) // 3
    parts = [seen.validated[i * per_validation : (i + 1) * per_validation] for i in range(3)]
    assert parts[0] == parts[1] == parts[2] != []
    assert len({str(batch) for _, batch in seen.trained}) == len(seen.trained)


def test_training_masks_are_the_same_on_any_number_of_ranks() -> None:
    def batches(rank: int, ranks: int) -> list[Any]:
        config = masked_run(f"data.batch_size={4 // ranks}", "trainer.max_steps=3")
        data = TextDataModule(config)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=ranks, global_step=0, max_steps=20, accumulate_grad_batches=1
        )
        data.setup()
        return list(data.train_dataloader())

    for whole, *parts in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        for field in range(3):
            assert torch.equal(whole[field], torch.cat([part[field] for part in parts]))


@pytest.mark.parametrize("own", ["sgconv model.kernel.kernel_dim=4", "rtf model.kernel.state_size=4"])
def test_other_kernels_train(own: str) -> None:
    name, setting = own.split()
    write_text()
    words = [word for word in SETTINGS if not word.startswith("model.kernel")]
    config = load_config(None, [*words, "task=masked", f"model.kernel.name={name}", setting])
    assert train(config)["val/ppl_masked"] < 500


def test_convert_and_generate_say_what_to_do(script: Any) -> None:
    train(masked_run("trainer.max_steps=2"))
    for words in (("convert", "runs/demo"), ("generate", "--model", "runs/demo", "--prompt", "x")):
        done = script(*words)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "task=masked can't be converted" in done.err
        assert "task=causal" in done.err
    assert not Path("runs/demo/converted").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=caus"], "expected one of causal, masked"),
        (["model.causal=false"], "task=causal predicts the next token"),
        (["data.mask_token=<mask>"], "is for task=masked only"),
        (["task=masked", "data.mask_fraction=0"], "data.mask_fraction=0"),
        (["task=masked", "data.mask_token=<|endoftext|>"], "is the same as data.eos_token"),
        (["task=masked", "model.vocab_size=257"], "must be at least 258"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(script: Any, words: list[str], message: str) -> None:
    done = script("train", "--dry-run", *words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err


def test_a_given_tokenizer_gets_the_mask_token() -> None:
    given = train_bpe(["some text"] * 3, 280, "<|endoftext|>", 3, False)
    Path("given.json").write_text(given.to_json())
    words = ("data.tokenizer=given.json", "trainer.max_steps=1")
    with pytest.raises(UserError, match=f"has {given.size + 1} tokens, the model only {given.size}"):
        train(masked_run(*words, f"model.vocab_size={given.size}"))
    train(masked_run(*words))
    read = load_encoder(Path("runs/demo/checkpoints/best.ckpt"))
    assert read.tokenizer.id_of("<|mask|>") == given.size


def test_the_task_can_not_change_on_resume() -> None:
    train(masked_run("trainer.max_steps=2"))
    for change in ("task=causal", "data.mask_fraction=0.3"):
        with pytest.raises(UserError, match="can't be changed on resume"):
            resumed_config(Path("runs/demo"), [change])
