"""Fine-tuning on conversations: a whole run, its resuming, its checkpoints, and batches of any loader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.support.conversations import TINY, chats, config_of, write_rows
from tnnlm.chat.templates import CHATML, PLAIN
from tnnlm.checkpoints.converted import load_converted
from tnnlm.checkpoints.training import load_checkpoint
from tnnlm.cli import prepare_data
from tnnlm.data.datamodule import TextDataModule
from tnnlm.errors import DataError
from tnnlm.models.batches import AnswerBatch
from tnnlm.training.batches import checked_batch
from tnnlm.training.resume import is_complete, resumed_config
from tnnlm.training.run import train

RUNS = ("base", "whole", "part")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TNNLM_CACHE", str(tmp_path / "cache"))


class Batches(Callback):
    """Callback that records the training batches."""

    def __init__(self) -> None:
        self.seen: list[AnswerBatch] = []

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the batch."""
        self.seen.append(batch)


def test_run_resumes_exactly_and_keeps_the_template() -> None:
    words = "optim.schedule=constant", "trainer.accumulate=2", "name=whole"
    path, seen = write_rows(chats()), Batches()
    summary = train(config_of(path, "chat", *words), extra_callbacks=[seen])
    steps = [seen.seen[i : i + 2] for i in range(0, 12, 2)]
    for parts in steps:
        assert {part.divisor for part in parts} == {sum(int(part.mask.sum()) for part in parts) / 2}
    assert abs(summary["val/ppl_gap"]) < 1e-3
    assert "val/bpb" not in summary
    assert summary["tokens_seen"] < 6 * 8 * 96

    config = config_of(path, "chat", *words, "name=part", "trainer.max_steps=3")
    train(config)
    part, later = Path("runs/part"), Batches()
    assert is_complete(resumed_config(part, []), part)
    assert not is_complete(resumed_config(part, ["trainer.max_steps=6"]), part)
    train(resumed_config(part, ["trainer.max_steps=6"]), part, extra_callbacks=[later])
    for one, other in zip(seen.seen[6:], later.seen, strict=True):
        assert torch.equal(one.marked, other.marked)
        assert one.divisor == other.divisor
    left, right = (load_checkpoint(run / "checkpoints/last.ckpt") for run in (Path("runs/whole"), part))
    for key, value in left.model.state_dict().items():
        assert torch.equal(value, right.model.state_dict()[key]), key

    assert left.tokenizer.chat_template == PLAIN
    stored = json.loads((part / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert stored["chat_template"] == PLAIN
    assert "assistant:" not in (part / "samples.txt").read_text(encoding="utf-8")


def test_conversations_are_prepared_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(chats())
    words = [*TINY, f"data.files={path}", "data.format=chat"]
    assert prepare_data.main(words) == 0
    out = capsys.readouterr().out
    assert "answer tokens, the only scored ones: train: " in out
    assert "the run trains on 24 rows: 0.6" in out


def test_order_of_a_resumed_run_keeps_its_blocks() -> None:
    data = TextDataModule(config_of(write_rows(chats())))
    data.load_state_dict({"samples_seen": 8, "step": 2, "block": 2})
    assert data.block == 2
    data.load_state_dict({"samples_seen": 8, "step": 2})  # of a run on text
    assert data.block == 2


def test_answers_of_any_loader_are_checked() -> None:
    config = config_of(Path("chat.jsonl"))
    rows = torch.randint(300, (2, 9), dtype=torch.int32)
    found = checked_batch(AnswerBatch(rows, torch.ones(2, 8, dtype=torch.bool)), config, first=True)
    assert found.rows.dtype == torch.int64
    with pytest.raises(DataError, match=r"batch\.mask: has dtype bool and shape \(2, 9\); expected bool"):
        checked_batch(AnswerBatch(rows, torch.ones(2, 9, dtype=torch.bool)), config, first=True)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
def test_adapters_on_conversations_learn_by_muon_with_the_template_of_the_weights(script: Any) -> None:
    pytest.importorskip("peft")
    path = write_rows(chats())
    train(config_of(path, "chat", "data.chat_template=chatml", "name=base", "trainer.sample_tokens=0"))
    shutil.copy("runs/base/checkpoints/last.ckpt", "alone.ckpt")
    start = (
        *(word for word in TINY if not word.startswith("model.")),
        f"data.files={path}",
        "data.format=chat",
        "init.weights=alone.ckpt",
        "init.lora.rank=2",
        "optim.optimizer=muon",
        "optim.schedule=constant",
        "conversion.method=window",
    )
    for words in (
        ("train", *start, "name=whole"),
        ("train", *start, "name=part", "trainer.max_steps=3"),
        ("train", "--resume", "part", "trainer.max_steps=6"),
        ("convert", "runs/part", "--no-compile", "--no-perplexity"),
    ):
        done = script(*words)
        assert done.code == 0, done.err
    base, whole, part = (load_checkpoint(Path(f"runs/{name}/checkpoints/last.ckpt")) for name in RUNS)
    assert part.tokenizer.chat_template == base.tokenizer.chat_template == CHATML
    assert load_converted(Path("runs/part/converted")).tokenizer.chat_template == CHATML
    moved = {
        key
        for key, value in part.model.state_dict().items()
        if not torch.equal(value, base.model.state_dict()[key])
    }
    assert moved
    assert all(key.startswith("blocks.") and ".kernel." not in key for key in moved)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[key]), key
