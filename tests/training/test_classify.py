"""Runs with task=classify: they learn, resume exactly, validate every row once, and are not convertible."""

from __future__ import annotations

import json
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
from tests.support.archive_files import WRITERS
from tests.support.ranks import run_ranks
from tnnlm.checkpoints.training import load_encoder
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.data.datamodule import TextDataModule
from tnnlm.data.sequences.listops import encode
from tnnlm.data.sequences.symbols import symbol_tokenizer
from tnnlm.errors import ConfigError, DataError
from tnnlm.evaluation import class_scores
from tnnlm.kernels import TNOConfig
from tnnlm.models.batches import LabelledBatch
from tnnlm.models.encoders import SequenceClassifier
from tnnlm.training.callbacks.checkpoint import TrainingStopped
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

SETTINGS = (
    "task=classify",
    "data.source=listops",
    "data.listops.min_length=4",
    "data.listops.max_length=12",
    "data.listops.max_depth=2",
    "data.listops.train_rows=400",
    "data.listops.val_rows=30",
    "data.listops.test_rows=50",
    "data.batch_size=16",
    "model.d_model=16",
    "model.n_layers=1",
    "model.vocab_size=16",
    "model.max_length=12",
    "model.n_classes=10",
    "model.kernel.rpe_dim=8",
    "model.kernel.rpe_layers=1",
    "trainer.max_steps=16",
    "trainer.val_every_n_steps=8",
    "trainer.log_every_n_steps=4",
    "trainer.accelerator=cpu",
    "checkpoint.every_n_steps=7",
)
ARCHIVE = tuple(word for word in SETTINGS if "listops" not in word)
"""Settings for the data of the Long Range Arena."""


def config_of(*overrides: str) -> Config:
    return load_config(None, [*SETTINGS, *overrides])


class StopAt(Callback):
    """Callback that requests a stop in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_zero_grad(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Send SIGINT once."""
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGINT)


def test_train_learns_and_writes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ("trainer.max_steps=150", "trainer.val_every_n_steps=50")
    summary = train(config_of(*steps, "optim.lr=1e-2", "optim.warmup_steps=10"))
    run = Path("runs/demo")
    assert summary["test/accuracy"] > 2 * summary["test/majority"]
    assert summary["val/accuracy_best"] >= summary["val/accuracy"] > 0.2
    assert summary == json.loads((run / "summary.json").read_text())
    assert "test accuracy of the best checkpoint" in capsys.readouterr().out
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows if row["val/accuracy"]] == ["50", "100", "150"]
    assert not any("val/ppl" in row or "val/bpb" in row for row in rows)
    assert not (run / "samples.txt").exists()
    curves = read_run(run)
    assert final_figures(curves)["val/accuracy"] == f"{summary['val/accuracy']:.4f}"
    for number in (1, 2):
        plot_runs([curves] * number, run / f"{number}.png")
        assert (run / f"{number}.png").stat().st_size > 10_000


def test_checkpoint_loads_and_scores_as_in_validation() -> None:
    config = config_of("trainer.max_steps=8", "trainer.precision=32-true")
    summary = train(config)
    read = load_encoder(Path("runs/demo/checkpoints/best.ckpt"))
    assert isinstance(read.model, SequenceClassifier)
    data = TextDataModule(config)
    data.setup()
    batch = torch.utils.data.default_collate(list(data.opened.val))
    scores = class_scores(read.model, batch)
    assert scores.rows == 30
    assert scores.accuracy == pytest.approx(summary["val/accuracy_best"])
    text = "( [MAX 1 ( 2 ) 9 ] )"
    assert read.tokenizer.encode(text) == (encode(text).astype(int) + 1).tolist()


@pytest.mark.parametrize("ema", [False, True])
def test_resume_is_exact(ema: bool) -> None:
    changes = ["model.dropout=0.1", "trainer.accumulate=2", *(["trainer.ema_decay=0.9"] if ema else [])]
    train(config_of(*changes, "name=whole"))
    with pytest.raises(TrainingStopped):
        train(config_of(*changes, "name=broken"), extra_callbacks=[StopAt(9)])
    run = Path("runs/broken")
    resumed = train(resumed_config(run, []), run)
    whole = json.loads(Path("runs/whole/summary.json").read_text())
    for key in ("val/accuracy", "val/accuracy_best", "test/accuracy", "test/loss", "tokens_seen"):
        assert resumed[key] == whole[key]
    kept = ("step", "val/accuracy", "train/loss")
    rows = [
        [[row[key] for key in kept] for row in read_metrics(Path(f"runs/{name}/metrics.csv"))]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1]
    left, right = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "broken")
    )
    for key, value in left["state_dict"].items():
        assert torch.equal(value, right["state_dict"][key]), key


def test_changes_that_make_it_another_run_are_refused() -> None:
    train(config_of("trainer.max_steps=2"))
    for word in ("data.listops.max_length=11", "data.lra.task=text", "task=masked"):
        with pytest.raises(ConfigError, match="can't be changed on resume"):
            resumed_config(Path("runs/demo"), [word])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_validation_row_counts_once_on_any_number_of_ranks(ranks: int) -> None:
    counted = []
    for rank in range(ranks):
        data = TextDataModule(config_of("data.batch_size=4"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=0)  # type: ignore[assignment]
        data.setup()
        for index, batch in enumerate(data.val_dataloader()):
            assert isinstance(batch, LabelledBatch)
            counted += [tokens.tolist() for tokens in batch.tokens[: data.val_counted(index)]]
    assert sorted(counted) == sorted(row.tokens.tolist() for row in data.opened.val)
    assert len(counted) == 30


def test_validation_can_be_cut() -> None:
    data = TextDataModule(config_of("data.max_val_tokens=120"))
    data.setup()
    assert len(data.opened.val) == 10


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="too few sequences, 400 to train on, where one batch needs 500"):
        train(config_of("data.batch_size=500"))
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize("task", ["text", "retrieval", "image"])
def test_tasks_of_the_archive_train(task: str) -> None:
    WRITERS[task](Path("lra"))
    length = 1024 if task == "image" else 24
    classes = 10 if task == "image" else 2
    words = ["data.source=lra", f"data.lra.task={task}", "data.lra.folder=lra", "data.batch_size=2"]
    sizes = ["model.vocab_size=257", f"model.max_length={length}", f"model.n_classes={classes}"]
    words += [*sizes, f"model.pair={task == 'retrieval'}", "trainer.max_steps=2"]
    summary = train(load_config(None, [*ARCHIVE, *words]))
    assert 0 <= summary["test/accuracy"] <= 1


def pair_model() -> SequenceClassifier:
    kernel = TNOConfig(rpe_dim=8, rpe_layers=1)
    config = ModelConfig(d_model=8, n_layers=2, vocab_size=16, max_length=10, pair=True, kernel=kernel)
    return SequenceClassifier(config).double().eval()


def test_the_sequences_of_a_pair_are_encoded_separately() -> None:
    model = pair_model()
    tokens = torch.randint(1, 16, (3, 2, 10))
    lengths = torch.tensor([[4, 10], [1, 3], [7, 7]])
    logits = model(tokens, lengths)
    for row, (pair, (first, second)) in enumerate(zip(tokens, lengths.tolist(), strict=True)):
        a, b = model.pooled(pair[:1, :first]), model.pooled(pair[1:, :second])
        assert torch.allclose(model.head(torch.cat((a, b, a * b, a - b), -1))[0], logits[row])
    assert not torch.allclose(model(tokens.flip(1), lengths.flip(1)), logits)
    assert torch.allclose(model(tokens), model(tokens, torch.full((3, 2), 10)))


def test_convert_and_generate_refuse_a_classifier(script: Any) -> None:
    train(config_of("trainer.max_steps=2"))
    for words in (("convert", "runs/demo"), ("generate", "--model", "runs/demo", "--prompt", "x")):
        result = script(*words)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "a model of task=classify can't be converted or generate text" in result.err


def test_mistakes_end_with_one_line_and_no_run(script: Any) -> None:
    for words, told in (
        (("data.source=lra",), "set data.lra.folder to"),
        (("data.source=lra", "data.lra.folder=nowhere"), "no such folder"),
        (("data.source=stdlib",), "can't be used with task=classify"),
        (("model.n_classes=3",), "listops needs n_classes=10"),
        (("data.listops.max_length=13",), "above model.max_length=12"),
        (("data.listops.max_args=1",), "must be at least 2"),
    ):
        settings = ARCHIVE if "data.source=lra" in words else SETTINGS
        result = script("train", *settings, *words)
        assert (result.code, result.err.count("\n")) == (2, 1), result
        assert told in result.err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize("text", ["plain text, 3 words", "cafÃ© 漢字 \x00\x7f\xad\n\t"])
def test_byte_tokens_are_the_bytes(text: str) -> None:
    tokenizer = symbol_tokenizer("text", "<|endoftext|>")
    assert tokenizer.encode(text) == [byte + 1 for byte in text.encode()]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.size == 257


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(strategy: str) -> None:
    # With 31 validation rows, the shares of the ranks are unequal.
    words = [*SETTINGS, "data.listops.val_rows=31", "trainer.precision=32-true"]
    (one,) = run_ranks(1, *words, "data.batch_size=8", "name=one")
    two = run_ranks(2, *words, "data.batch_size=4", f"trainer.strategy={strategy}", "name=two")
    assert two[0]["metrics"]["val/accuracy"] == two[1]["metrics"]["val/accuracy"]
    assert two[0]["metrics"]["val/accuracy"] == pytest.approx(one["metrics"]["val/accuracy"], abs=1.01 / 31)
    found = [json.loads(Path(f"runs/{name}/summary.json").read_text()) for name in ("one", "two")]
    assert found[0]["test/loss"] == pytest.approx(found[1]["test/loss"], abs=1e-3)
    assert found[0]["tokens_seen"] == found[1]["tokens_seen"]
