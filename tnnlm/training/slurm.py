"""SLURM support: a requeued job resumes the run that it started, and no other run."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from tnnlm.checkpoints.settings_file import SETTINGS_FILE, verify_settings
from tnnlm.checksums import read_signed, write_signed
from tnnlm.config.checks import leaves
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.config.values import one_line, typed
from tnnlm.errors import CheckpointError, ConfigError, UserError
from tnnlm.files import only_process
from tnnlm.training.callbacks.checkpoint import TIME_LIMIT
from tnnlm.trust import NO_CODE, Trust

JOB = Path("job.json")
"""File in a run's folder that records the job the run belongs to."""
_LOG = logging.getLogger("tnnlm")


class TimeLimit(Exception):
    """Signal of the cluster's time limit outside of training, when there is nothing to save."""


def slurm_job() -> str | None:
    """Return the SLURM job id of this process, including the array task; None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def job_name(given: str) -> str:
    """Return the name to record a run under: ``given``, or the SLURM job, whose id survives requeueing.

    Raises:
        ConfigError: If ``given`` is empty and there is no SLURM job.
    """
    if given:
        return given
    number = slurm_job()
    if number is None:
        raise ConfigError("--job: not running in a SLURM job", "pass a name: --job NAME")
    return f"slurm {os.environ.get('SLURM_CLUSTER_NAME', '')} {number}".replace("  ", " ")


def record_job(run: Path, job: str) -> None:
    """Record in a run's folder which job the run belongs to."""
    write_signed(run / JOB, {"job": job, "run": run.name})


def begin_job(job: str, config: Config, create: Callable[[], Path]) -> Path:
    """Create and return the folder of the run that a job starts, and record the job in it.

    Args:
        job: Name of the job from :func:`job_name`.
        config: Configuration of the run.
        create: Function that creates the folder and returns it.

    Raises:
        CheckpointError: If another process starts a run of this job, or has started one since
            :func:`find_job` found none.
    """
    number = hashlib.sha256(job.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    refusal = CheckpointError(
        f"--job {job}: another process starts a run of this job",
        "wait, and run the same command to resume it",
    )
    with only_process(config.runs_folder / f"job-{number}", refusal):
        found = find_job(job, config)
        if found is not None:
            raise CheckpointError(
                f"--job {job}: another process has started {found}", "run the same command to resume it"
            )
        folder = create()
        record_job(folder, job)
        return folder


def find_job(job: str, config: Config, trust: Trust = NO_CODE) -> Path | None:
    """Find the run that a job started; return None if it has not started one.

    Args:
        job: Name of the job from :func:`job_name`.
        config: Configuration from the job's command. Runs are searched in its ``runs_dir``.
        trust: Whether the kernel module of the run may run although this machine hasn't run it before.

    Raises:
        ConfigError: If the run's settings differ from ``config``, so that it belongs to another experiment.
        CheckpointError: If the record of a run is damaged that may be of this job. Other damaged records
            are skipped, which is logged.
    """
    for run in sorted(config.runs_folder.glob("*")):
        path = run / JOB
        if not os.path.lexists(path):
            continue
        try:
            if _recorded_job(path) != job:
                continue
        except CheckpointError as error:
            # The run may be of this job only if its settings are those of the command.
            recorded = _settings(run)
            if recorded is not None and _difference(config, recorded) is None:
                remedy = f'restore it, or remove it if its run is not of job "{job}"'
                raise CheckpointError(error.reason, remedy) from None
            if recorded is None:
                _LOG.warning("%s; it was skipped, its run has no readable config.yaml", error.reason)
            else:
                _LOG.warning("%s; it was skipped, its run has other settings than this job", error.reason)
            continue
        if os.path.lexists(run / SETTINGS_FILE):
            verify_settings(run)
            _check_same(config, load_config(run / "config.yaml", saved=True, trust=trust), job, run)
        return run
    return None


def _recorded_job(path: Path) -> str:
    """Return the name of the job in a record.

    Raises:
        CheckpointError: If the record is damaged, or is that of another run.
    """
    record = read_signed(path, "", older={"job"})
    job, name = record.get("job"), record.get("run", path.parent.name)
    if not isinstance(job, str):
        raise CheckpointError(f"{path}: is damaged (it names no job)")
    # The folder may have been renamed; its settings keep the name with which the job began.
    settings = _settings(path.parent) if name != path.parent.name else None
    if name not in (path.parent.name, settings and settings.name):
        raise CheckpointError(f"{path}: is the record of the run {name!r}")
    return job


def _settings(run: Path) -> Config | None:
    """Return the settings of a run; None if they can't be read."""
    try:
        return load_config(run / SETTINGS_FILE, saved=True)
    except UserError:
        return None


def requeue() -> str:
    """Requeue this SLURM job; it will run the same command under the same job id.

    Returns:
        The job id.

    Raises:
        UserError: If SLURM rejects the request.
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
        raise UserError(
            f"job {number}: could not be requeued ({problem.splitlines()[0]}); submit it again with sbatch"
        )
    return number


@contextmanager
def time_limit_noticed() -> Iterator[None]:
    """Raise :class:`TimeLimit` on the cluster's signal, which would otherwise kill the process silently.

    During training :class:`~tnnlm.training.callbacks.checkpoint.CheckpointLast` handles the signal instead.
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
    """Return Lightning's SLURM environment with auto-requeue disabled, if srun started this process.

    Lightning's auto-requeue saves inside the signal handler, in the middle of a step, and resumes from any
    such file that it finds in the folder.
    """
    # Inside a SLURM job, processes may have been started by torchrun instead of srun.
    by_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if by_srun else []


def _check_same(config: Config, recorded: Config, job: str, run: Path) -> None:
    differs = _difference(config, recorded)
    if differs is not None:
        key, old, new = differs
        raise ConfigError(
            f"--job: {run} of job {job!r} has {key}={one_line(typed(old))}, not {one_line(typed(new))}",
            f"pass another name with --job NAME, or continue that run with --resume {run}",
        )


def _difference(config: Config, recorded: Config) -> tuple[str, Any, Any] | None:
    """Return the first setting that differs: its key, its value in the run and its value in the command.

    Name and place are not compared: a run in a numbered folder such as demo-2 has that as its name.
    """
    new, old = ({name: value for name, value, _ in leaves(c)} for c in (config, recorded))
    for key in sorted(new.keys() | old.keys()):
        if key not in ("name", "runs_dir") and new.get(key) != old.get(key):
            return key, old.get(key), new.get(key)
    return None
