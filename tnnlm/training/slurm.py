"""A job of a cluster that is stopped and started again goes on with its own run, and no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from tnnlm.config.checks import leaves
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError, UserError
from tnnlm.files import write_text
from tnnlm.training.callbacks.checkpoint import TIME_LIMIT

JOB = Path("job.json")
"""in a run's folder: the job it belongs to"""


class TimeLimit(Exception):
    """The cluster is about to end the job, and nothing is being trained that could be saved."""


def slurm_job() -> str | None:
    """The number of the SLURM job that this process belongs to, array task included; None outside."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def job_name(given: str) -> str:
    """What a run is recorded under: the given name, else the SLURM job, which keeps its number when requeued.

    Raises:
        ConfigError: if neither is there.
    """
    if given:
        return given
    number = slurm_job()
    if number is None:
        raise ConfigError("--job: this is no SLURM job", "give a name: --job NAME")
    return f"slurm {os.environ.get('SLURM_CLUSTER_NAME', '')} {number}".replace("  ", " ")


def record_job(run: Path, job: str) -> None:
    """Note in a run's folder which job it belongs to."""
    write_text(run / JOB, json.dumps({"job": job}) + "\n")


def find_job(job: str, config: Config) -> Path | None:
    """The run that a job began; None if it began none.

    Args:
        job: as from :func:`job_name`.
        config: what the job's command says; runs are looked for under its ``runs_dir``.

    Raises:
        ConfigError: if the run's settings are others: it is some other experiment's.
    """
    for path in sorted(Path(config.runs_dir).glob(f"*/{JOB}")):
        if json.loads(path.read_text(encoding="utf-8")).get("job") != job:
            continue
        run = path.parent
        if (run / "config.yaml").is_file():
            _check_same(config, load_config(run / "config.yaml"), job, run)
        return run
    return None


def requeue() -> str:
    """Ask SLURM to start this job again; it will get the same number and command.

    Returns:
        the job's number.

    Raises:
        UserError: if SLURM refuses.
    """
    number = slurm_job()
    assert number is not None
    try:
        done = subprocess.run(
            ["scontrol", "requeue", number], capture_output=True, encoding="utf-8", timeout=60, check=False
        )
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        raise UserError(f"job {number} could not be requeued ({problem.splitlines()[0]})")
    return number


@contextmanager
def time_limit_noticed() -> Iterator[None]:
    """Raise :class:`TimeLimit` on the cluster's signal, where it would end the process without a word.

    While steps are trained the signal is :class:`~tnnlm.training.callbacks.checkpoint.CheckpointLast`'s.
    """
    if TIME_LIMIT is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimit

    before = signal.signal(TIME_LIMIT, stop)
    try:
        yield
    finally:
        signal.signal(TIME_LIMIT, before)


def cluster_plugins() -> list[Any]:
    """SLURM as Lightning knows it, without Lightning's own requeue: that saves in the signal handler, in
    the middle of a step, and picks up whatever such file lies in the folder."""
    # torchrun's processes, inside a SLURM job too, are torchrun's.
    by_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if by_srun else []


def _check_same(config: Config, recorded: Config, job: str, run: Path) -> None:
    new, old = ({name: value for name, value, _ in leaves(c)} for c in (config, recorded))
    for key in sorted(new.keys() | old.keys()):
        # The folder's number is part of its name.
        if key not in ("name", "runs_dir") and new.get(key) != old.get(key):
            raise ConfigError(
                f"--job: {run} of job {job!r} has {key}={old.get(key)}, not {new.get(key)}",
                f"give this training another name: --job NAME, or continue that one: --resume {run}",
            )
