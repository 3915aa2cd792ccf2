"""What a run is continued from: the newest whole checkpoint, and nothing that came after it."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

from tnnlm.checkpoints.locate import LAST, PREVIOUS
from tnnlm.checkpoints.training import read_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, ConfigError, command
from tnnlm.files import write_text
from tnnlm.training.callbacks.checkpoint import second_name
from tnnlm.training.summary import read_summary

SOURCES = {"last": LAST, "previous": PREVIOUS}
"""what ``train.py --from`` takes"""
REPLACED = Path("checkpoints") / "replaced.ckpt"
"""a last.ckpt that was put aside for the one before it"""
_FIXED_ON_RESUME = (
    "name",
    "runs_dir",
    "seed",
    "task",
    "model.",
    "data.mask",
    "data.listops",
    "data.lra.task",
    "trainer.ema_decay",
)


def resumed_config(run: Path, overrides: list[str]) -> Config:
    """The configuration of a run, with changes from the command line.

    Raises:
        ConfigError: if a change would make it another run.
        CheckpointError: if the run was killed before it had written its settings.
    """
    for word in overrides:
        if word.startswith(_FIXED_ON_RESUME):
            raise ConfigError(f"{word}: can't be changed on resume", "start a new run")
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: has no config.yaml to continue from", "start it again")
    config = load_config(run / "config.yaml", overrides)
    config.name, config.runs_dir = run.name, str(run.parent)
    return config


def began(run: Path) -> bool:
    """Whether a run has come as far as its first checkpoint, which is that of step 0."""
    return any((run / name).is_file() for name in (LAST, PREVIOUS))


def is_complete(config: Config, run: Path) -> bool:
    """Whether all is done, the summary included: a run can be killed between its last step and that."""
    if not (run / LAST).is_file():
        return False
    checkpoint = read_checkpoint(run / LAST)
    tokens = checkpoint["TextDataModule"]["samples_seen"] * config.model.max_length
    at_end = int(checkpoint["global_step"]) >= config.trainer.max_steps
    return at_end and read_summary(run).get("tokens_seen") == tokens


def check_resumable(config: Config, run: Path, source: Path = LAST) -> int:
    """The step that ``run`` continues at.

    Raises:
        CheckpointError: if there is no whole checkpoint, naming the one before if that is whole; or
            if the run is complete.
    """
    if not began(run):
        settings = " --config " + str(run / "config.yaml") if (run / "config.yaml").is_file() else ""
        raise CheckpointError(
            f"{run}: ended before its first checkpoint", f"start it again with: {command('train')}{settings}"
        )
    try:
        step = _whole_step(run / source)
    except CheckpointError as error:
        raise CheckpointError(error.reason, _advice(run, source)) from None
    if source == LAST and is_complete(config, run):
        raise CheckpointError(
            f"{run}: is complete at step {step}", f"to train on, add trainer.max_steps=N with N above {step}"
        )
    return step


def begin_at(run: Path, source: Path, step: int) -> None:
    """Make ``source`` the last checkpoint, and drop what killed processes left half-written.

    A last checkpoint that is not gone on from is kept as replaced.ckpt.
    """
    for left in [*run.glob(".*.tmp"), *(run / LAST.parent).glob(".*.tmp")]:
        if left.is_file():
            left.unlink()
    if source != LAST:
        if (run / LAST).is_file():
            second_name(run / LAST, run / REPLACED)
        second_name(run / source, run / LAST)
    _trim_samples(run / "samples.txt", step)


def _whole_step(path: Path) -> int:
    step = int(read_checkpoint(path)["global_step"])
    try:
        # torch reads numbers that were changed on the disk without a word; the archive has checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError):
        damaged = path.name
    if damaged is not None:
        raise CheckpointError(f"{path}: is damaged")
    return step


def _advice(run: Path, source: Path) -> str:
    for name, other in SOURCES.items():
        if other != source and (run / other).is_file():
            try:
                step = _whole_step(run / other)
            except CheckpointError:
                continue
            return f"{run / other} is whole, of step {step}: {command('train')} --resume {run} --from {name}"
    return f"no other is whole; start again with: {command('train')} --config {run / 'config.yaml'}"


def _trim_samples(path: Path, step: int) -> None:
    """Drop the samples of steps that will be done again."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for header in re.finditer(r"^--- step (\d+)$", text, flags=re.MULTILINE):
        if int(header[1]) > step:
            write_text(path, text[: header.start()])
            return
