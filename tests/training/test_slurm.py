"""Cluster time limits: the run is saved after a step, requeued, and resumed by the same command."""

from __future__ import annotations

import json
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

from tests.support.scripts import ROOT, assert_refused
from tests.support.training_runs import SETTINGS, assert_same_run, tiny_run, write_text
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.config.shipped import find_config
from tnnlm.errors import CheckpointError, ConfigError, UserError
from tnnlm.training import run
from tnnlm.training.run import train
from tnnlm.training.slurm import cluster_plugins, find_job, job_name, record_job, requeue

SBATCH = ROOT / "tools/slurm/train.sbatch"
RUN = Path("runs/demo")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Simulate one task on one node, with SLURM commands that log their arguments; return the log file."""
    tools = tmp_path / "bin"
    notes = tmp_path / "scontrol.txt"
    programs = {
        "scontrol": f'echo "$@" >> {notes}\n',
        # As srun does: options first, then the command, whose process receives the signals of the job.
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done\necho $$ > pid.txt\nexec "$@"\n',
        "python": f'exec {sys.executable} "$@"\n',
    }
    tools.mkdir()
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    values = {
        "JOB_ID": "4711", "JOB_NAME": "tnnlm", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1",
        "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "127.0.0.1",
        "CPUS_PER_TASK": str(torch.get_num_threads()),
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return notes


def signal_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the signal of the time limit to this process, once, in the middle of a step."""
    sent = []

    def send(self: Any, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("tnnlm.training.callbacks.validation.ValidationSchedule.on_before_backward", send)


def test_a_requeued_job_loses_no_step(script: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text()
    assert script("train", *SETTINGS, "name=whole").code == 0
    command = ("--job", *SETTINGS)
    signal_at(9, monkeypatch)
    first = script("train", *command)
    assert first.code == 0, first.err
    assert "stopped after step 10, saved" in first.err
    assert slurm.read_text() == "requeue 4711\n"
    # Newer runs of other jobs are not resumed.
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    assert script("train", *command, "trainer.max_steps=3").code == 0
    recorded = json.loads(Path("runs/demo-2/job.json").read_text())
    assert (recorded["job"], recorded["run"]) == ("slurm 4712", "demo-2")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    second = script("train", *command)
    assert second.code == 0, second.err
    assert "continuing at step 10" in second.out
    assert_same_run(Path("runs/whole"), RUN)
    assert len(list((RUN / "tensorboard").glob("events*"))) == 2
    # A third start has nothing left to do.
    third = script("train", *command)
    assert third.code == 0
    assert "is complete" in third.out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2", "whole"]
    assert not list(Path().rglob("hpc_ckpt*"))


def test_the_batch_script_is_stopped_and_requeued(slurm: Path, script: Any) -> None:
    write_text()
    words = [*SETTINGS, "trainer.max_steps=120", "trainer.val_every_n_steps=60"]
    assert script("train", *words, "name=whole").code == 0
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT), "PYTHONPATH": str(ROOT)}
    placed = [
        f"data.files=[{Path('text.txt').resolve()}]",
        f"runs_dir={Path('runs').resolve()}",
        "name=batch",
    ]
    command = ["bash", str(SBATCH), "--config", "configs/demo.yaml", *words, *placed]
    environment["SLURM_SUBMIT_DIR"] = str(Path.cwd())
    for name in ("train.py", "configs"):
        Path(name).symlink_to(ROOT / name)
    metrics = Path("runs/batch/metrics.csv")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not (metrics.exists() and "\n20," in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(int(Path("pid.txt").read_text()), signal.SIGUSR1)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    assert "requeued job 4711" in output
    assert slurm.read_text() == "requeue 4711\n"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continuing at step" in again.stdout
    assert_same_run(Path("runs/whole"), Path("runs/batch"))


def test_a_job_that_was_killed_before_its_first_checkpoint_begins_again_in_its_folder(script: Any) -> None:
    write_text()
    RUN.mkdir(parents=True)
    record_job(RUN, "night")
    assert script("train", "--job", "night", *SETTINGS, "trainer.max_steps=4").code == 0
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]
    assert (RUN / "summary.json").is_file()


def test_one_of_two_processes_that_start_the_same_job_wins(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    second: list[Any] = []
    settings = (*SETTINGS, "trainer.max_steps=1", "trainer.sample_tokens=0")
    words = ("train", "--job", "night", *settings)
    create = run._new_folder

    def meanwhile(config: Config) -> Path:
        """Start the job once more before the folder of its run exists."""
        second.append(script(*words))
        return create(config)

    write_text()
    monkeypatch.setattr(run, "_new_folder", meanwhile)
    assert script(*words).code == 0
    assert_refused(second[0], "--job night: another process starts a run of this job")
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]
    with pytest.raises(CheckpointError, match="another process has started runs/demo; run the same command"):
        train(load_config(find_config("demo"), settings), job="night")
    assert [path.name for path in Path("runs").iterdir()] == ["demo"]


def test_another_experiment_of_the_same_job_is_refused(script: Any) -> None:
    write_text()
    assert script("train", "--job", "night", *SETTINGS, "trainer.max_steps=4").code == 0
    for change in ("optim.lr=5e-4", "seed=1", "model.d_model=16"):
        refused = script("train", "--job", "night", *SETTINGS, "trainer.max_steps=4", change)
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert change.partition("=")[0] in refused.err
        assert "--resume runs/demo" in refused.err


def test_the_time_limit_outside_of_training_requeues_too(
    script: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text()

    def slow(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)
        raise AssertionError("not interrupted")

    monkeypatch.setattr("tnnlm.data.tasks.open_text_corpus", slow)
    assert script("train", "--job", *SETTINGS).code == 0
    assert slurm.read_text() == "requeue 4711\n"
    assert not Path("runs").exists()


def test_only_a_command_that_resumes_is_requeued(
    script: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text()
    signal_at(5, monkeypatch)
    stopped = script("train", *SETTINGS)
    assert stopped.code == 0
    assert "not requeued" in stopped.err
    assert not slurm.exists()
    signal_at(12, monkeypatch)
    assert script("train", "--resume", "demo").code == 0
    assert slurm.read_text() == "requeue 4711\n"
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.delenv("SLURM_NTASKS")
    (slurm.parent / "bin/srun").unlink()
    signal_at(15, monkeypatch)
    assert script("train", "--resume", "demo").code == 0
    assert slurm.read_text() == "requeue 4711\n"


def test_requeue_says_why_it_failed(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm.parent / "bin/scontrol").write_text("#!/bin/sh\necho 'Job not requeueable' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"4711: could not be requeued \(Job not requeueable\)"):
        requeue()
    monkeypatch.setenv("PATH", str(slurm.parent))
    with pytest.raises(UserError, match="4711: could not be requeued"):
        requeue()


def test_job_names(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_name("mine") == "mine"
    assert job_name("") == "slurm 4711"
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "north")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_name("") == "slurm north 4700_3"
    requeue()
    assert slurm.read_text() == "requeue 4700_3\n"
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="--job NAME"):
        job_name("")
    assert find_job("mine", tiny_run()) is None


def test_lightning_does_not_handle_signals(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (environment,) = cluster_plugins()
    assert environment.auto_requeue is False
    seen = []

    class Look(Callback):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            seen.append(signal.getsignal(signal.SIGUSR1))

    train(tiny_run("trainer.max_steps=1"), extra_callbacks=[Look()])
    assert seen == [signal.SIG_DFL]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cluster_plugins() == []


def test_every_setting_in_the_scripts_exists() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    known = {"NNODES": "2", "NTASKS_PER_NODE": "4"}
    for path in (SBATCH, ROOT / "tools/slurm/README.md"):
        text = re.sub(r"\$\{SLURM_(\w+):-1\}", lambda m: known.get(m[1], "1"), path.read_text())
        lines = [line for line in text.splitlines() if re.search(r"\w+\.\w+=", line)]
        words = [w for line in lines for w in re.findall(r"(?<![\w-])\w+\.\w+=[\w.\"-]+", line)]
        words = [word.replace('"', "") for word in words if not word.endswith("...")]
        assert words
        for word in words:
            load_config(None, [word])
    names = re.findall(r'^    "(.*)"$', SBATCH.read_text(), flags=re.MULTILINE)
    assert len({load_config(None, shlex.split(line)).name for line in names}) == len(names) == 3


def test_the_scripts_request_what_a_requeue_needs() -> None:
    text = SBATCH.read_text()
    for option in ("--requeue", "--signal=USR1@", "--open-mode=append", "--ntasks-per-node="):
        assert re.search(rf"^#SBATCH {option}", text, flags=re.MULTILINE), option
