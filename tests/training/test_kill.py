"""SIGKILL at any point, damaged files, full disks: the run resumes, and ends like an unbroken run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.killed_run import train_until_killed
from tests.support.resume_worker import Scenario
from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, assert_same_run, tiny_run, write_text
from tnnlm.config.loader import load_config
from tnnlm.errors import CheckpointError
from tnnlm.training.callbacks.checkpoint import TrainingStopped, second_name
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

WORDS = ("trainer.accumulate=2", "model.dropout=0.1", "trainer.max_steps=18", "trainer.log_every_n_steps=4")
RUN = Path("runs/killed")
LAST, PREVIOUS = RUN / "checkpoints/last.ckpt", RUN / "checkpoints/previous.ckpt"


def kill_at(place: str, *words: str) -> None:
    """Train in another process until it is killed; a fork server imports the modules once for all tests."""
    write_text()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tnnlm.training.run"])
    settings = [*SETTINGS, *WORDS, "name=killed", *words]
    process = context.Process(target=train_until_killed, args=(Path.cwd(), settings, place))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("place", "kept"), [("step", 14), ("validation", 14), ("save", 7), ("rename", 7), ("end", 18)]
)
def test_a_killed_run_ends_as_an_unkilled_one(place: str, kept: int) -> None:
    train(tiny_run(*WORDS, "name=whole"))
    kill_at(place)
    assert step_of(LAST) == kept
    summary = train(resumed_config(RUN, []), RUN)
    assert_same_run(Path("runs/whole"), RUN)
    assert summary["tokens_seen"] == 18 * 2 * 4 * 32
    assert (RUN / "loss.png").is_file()
    assert not list(RUN.glob("**/.*.tmp"))


def test_tensorboard_shows_each_step_once() -> None:
    kill_at("rename")
    time.sleep(1.1)  # TensorBoard sorts its files by the second in which they were opened
    train(resumed_config(RUN, []), RUN)
    events = EventAccumulator(str(RUN / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 12, 16, 18]
    assert [event.step for event in events.Scalars("val/ppl")] == [8, 16, 18]


def test_a_kill_before_the_first_checkpoint_blocks_nothing(script: Any) -> None:
    kill_at("start")
    assert not LAST.exists()
    refused = script("train", "--resume", "killed")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    command = re.search(r"start it again with: python train\.py (.*)\n", refused.err)
    assert command is not None
    assert script("train", *shlex.split(command[1])).code == 0
    assert step_of(Path("runs/killed-2/checkpoints/last.ckpt")) == 18


def test_a_run_can_be_resumed_from_its_first_step_on() -> None:
    train(tiny_run(*WORDS, "name=whole"))

    class Crash(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(tiny_run(*WORDS, "name=killed"), extra_callbacks=[Crash()])
    assert step_of(LAST) == 0
    train(resumed_config(RUN, []), RUN)
    assert_same_run(Path("runs/whole"), RUN)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path) -> None:
    """Flip one bit of a weight, which torch itself would load without an error."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, change, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_suggested(script: Any, damage: Any) -> None:
    train(tiny_run(*WORDS, "name=whole"))

    class Crash(Callback):
        def on_before_backward(self, trainer: lightning.Trainer, *args: Any) -> None:
            if trainer.global_step == 16:
                raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(tiny_run(*WORDS, "name=killed"), extra_callbacks=[Crash()])
    assert (step_of(PREVIOUS), step_of(LAST)) == (7, 14)
    damage(LAST)
    refused = script("train", "--resume", "killed")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert str(LAST) in refused.err
    offered = re.search(
        rf"{PREVIOUS} of step 7 is intact; resume from it with: python train\.py (.*)\n", refused.err
    )
    assert offered is not None
    assert script("train", *shlex.split(offered[1])).code == 0
    assert_same_run(Path("runs/whole"), RUN)
    if damage is not Path.unlink:
        assert (RUN / "checkpoints/replaced.ckpt").is_file()


def test_a_run_without_an_intact_checkpoint_is_refused(script: Any) -> None:
    train(tiny_run("trainer.max_steps=4", "name=killed"))
    for path in (LAST, PREVIOUS):
        truncate(path)
    refused = script("train", "--resume", "killed")
    assert refused.code == 2
    assert str(LAST) in refused.err
    assert "start again" in refused.err


def test_from_goes_with_resume(script: Any) -> None:
    assert "--from" in script("train", "--from", "previous").err
    assert "--job" in script("train", "--job", "x", "--resume").err


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text()
    assert script("train", *SETTINGS, *WORDS, "name=whole").code == 0
    save = torch.save

    def full(checkpoint: Any, file: Any) -> None:
        if checkpoint["global_step"] >= 10:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    stopped = script("train", *SETTINGS, *WORDS, "name=killed")
    assert stopped.code == 2
    assert stopped.err.count("\n") == 1
    assert "the disk is full" in stopped.err
    assert step_of(LAST) == 7
    monkeypatch.setattr(torch, "save", save)
    command = re.search(r"resume from step 7 with: python train\.py (.*)\n", stopped.err)
    assert command is not None
    assert script("train", *shlex.split(command[1])).code == 0
    assert_same_run(Path("runs/whole"), RUN)


def test_second_name_works_without_hard_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    last, previous = tmp_path / "last", tmp_path / "previous"
    for text in ("one", "two"):
        last.write_text(text)
        second_name(last, previous)
        second_name(last, previous)  # the run was killed after the first call and repeats it
        assert last.read_text() == previous.read_text() == text
        last.unlink()

    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    last.write_text("three")
    monkeypatch.setattr(os, "link", refuse)
    second_name(last, previous)
    assert previous.read_text() == "three"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["previous"]


def test_a_truncated_row_is_dropped() -> None:
    train(tiny_run("trainer.max_steps=10", "name=whole"))
    train(tiny_run("trainer.max_steps=5", "name=killed"))
    with (RUN / "metrics.csv").open("a") as file:
        file.write("5,4.1")
    train(resumed_config(RUN, ["trainer.max_steps=10"]), RUN)
    steps = [row["step"] for row in read_metrics(RUN / "metrics.csv") if row["train/loss"]]
    assert steps == ["5", "10"]


def test_settings_of_the_optimizer_can_change_on_resume() -> None:
    train(tiny_run("trainer.max_steps=8", "name=killed", "optim.schedule=constant"))
    train(resumed_config(RUN, ["trainer.max_steps=16", "optim.lr=1e-4", "optim.weight_decay=0.3"]), RUN)
    checkpoint = torch.load(LAST, weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert groups[0]["weight_decay"] == 0.3
    assert all(group["lr"] <= 1e-4 for group in groups)
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [1e-4] * len(groups)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_loader_processes_too_and_do_no_harm(number: int) -> None:
    words = (*WORDS, "data.num_workers=1")
    train(tiny_run(*words, "name=whole"))

    class SignalAll(Callback):
        def on_before_zero_grad(self, trainer: lightning.Trainer, *args: Any) -> None:
            if trainer.global_step == 9:
                children = multiprocessing.active_children()
                assert children
                for process_id in (*(child.pid for child in children), os.getpid()):
                    assert process_id is not None
                    os.kill(process_id, number)

    with pytest.raises(TrainingStopped, match="after step 10") as stopped:
        train(tiny_run(*words, "name=killed"), extra_callbacks=[SignalAll()])
    assert stopped.value.time_limit is (number == signal.SIGUSR1)
    train(resumed_config(RUN, []), RUN)
    assert_same_run(Path("runs/whole"), RUN)


def test_a_hangup_that_nohup_ignores_does_not_stop_a_run() -> None:
    class HangUp(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tiny_run("trainer.max_steps=2", "trainer.sample_tokens=0"), extra_callbacks=[HangUp()])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def worker(*words: str) -> tuple[int, str]:
    """Run resume_worker.py and return its exit code and errors."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/resume_worker.py"), *words],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_order_is_kept_when_one_rank_resumes_as_two_and_one_is_killed() -> None:
    common = ("trainer.precision=32-true", "trainer.sample_tokens=0", "trainer.max_steps=18")
    words = (*common, "data.batch_size=4", "trainer.devices=1")
    # The single-rank runs train in this process: a new one would import Lightning first, 12 s on one core.
    train(tiny_run("name=whole", *words), extra_callbacks=[Scenario("whole", {"nan": 11})])
    with pytest.raises(TrainingStopped):
        train(tiny_run("name=killed", *words), extra_callbacks=[Scenario("killed", {"nan": 11, "stop": 7})])
    two = ("resume=runs/killed", "trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=2", "nan=11")
    # Rank 1 is killed in step 16, after the checkpoint of step 14; the timeout above ends rank 0.
    code, errors = worker(*two, "kill=16")
    assert code != 0
    assert step_of(LAST) == 14, errors
    code, errors = worker(*two)
    assert code == 0, errors

    def order(name: str) -> dict[int, list[int]]:
        """Return fingerprints of all rows of every step, in the global order; a repeated step counts once."""
        steps: dict[int, dict[int, list[int]]] = {}
        for path in sorted(Path().glob(f"order-{name}-*.jsonl")):
            for line in path.read_text().splitlines():
                step, rank, rows = json.loads(line)
                assert steps.setdefault(step, {}).setdefault(rank, rows) == rows
        return {step: [row for rank in sorted(ranks) for row in ranks[rank]] for step, ranks in steps.items()}

    assert order("whole") == order("killed")
    assert sorted(order("whole")) == list(range(18))
    final = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (Path("runs/whole"), RUN)
    ]
    for key, value in final[0]["state_dict"].items():
        torch.testing.assert_close(value, final[1]["state_dict"][key], rtol=0, atol=1e-5)
    # Both ranks skipped the step in which one of them had a loss that is not finite.
    assert [checkpoint["callbacks"]["Guard"]["skipped"] for checkpoint in final] == [1, 1]
    assert load_config(RUN / "config.yaml").trainer.devices == 2


def test_crash_test_as_a_user_runs_it() -> None:
    command = [sys.executable, str(ROOT / "tools/crash_test.py"), "--kills", "3", "--json", "kills.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(Path("kills.json").read_text())
    assert result["identical"] is True
    assert len(result["kills"]) == 3
    assert "identical: after 3 kills" in done.stdout


def test_resume_needs_settings() -> None:
    RUN.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        resumed_config(RUN, [])
