"""Resuming a run from its newest intact checkpoint, without the outputs of later steps."""

from __future__ import annotations

import re
from pathlib import Path

from tnnlm.checkpoints.locate import IMPORTED, LAST, PREVIOUS
from tnnlm.checkpoints.training import read_checkpoint, read_intact
from tnnlm.config.checks import leaves
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, ConfigError, command
from tnnlm.files import write_text
from tnnlm.training.callbacks.checkpoint import second_name
from tnnlm.training.data_check import keep_text_of_old_run
from tnnlm.training.summary import read_summary

SOURCES = {"last": LAST, "previous": PREVIOUS}
"""Values of ``train.py --from`` and the checkpoint that each selects."""
REPLACED = Path("checkpoints") / "replaced.ckpt"
"""Backup of last.ckpt, made when a run resumes from previous.ckpt."""
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
    """Return the configuration of a run with overrides from the command line.

    Settings are compared by their values, in whatever way the overrides give them.

    Raises:
        ConfigError: If an override changes a setting that is fixed for the lifetime of a run.
        CheckpointError: If the run was killed before it saved its configuration, or was imported.
    """
    path = run / "config.yaml"
    if (run / IMPORTED).is_file():
        raise CheckpointError(
            f"{run}: was imported and has no training to resume",
            f"start a new run from it with: {command('train', '--init-from', run)}",
        )
    if not path.is_file():
        raise CheckpointError(f"{run}: has no config.yaml to resume from", "start the run again")
    recorded = load_config(path, saved=True)
    try:
        config = load_config(path, overrides, saved=True)
    except ConfigError:
        for word in overrides:  # a change that does not fit the other settings of the run either
            if word.startswith(_FIXED_ON_RESUME):
                raise ConfigError(f"{word}: can't be changed on resume", "start a new run") from None
        raise
    name, folder = recorded.name, recorded.runs_dir
    for found in (recorded, config):
        # A run whose folder was moved or renamed may be given its new name and place, and its recorded ones.
        if found.name == name:
            found.name = run.name
        if found.runs_dir == folder:
            found.runs_dir = str(run.parent)
    old, new = ({key: value for key, value, _ in leaves(found)} for found in (recorded, config))
    for key in new | old:
        if key.startswith(_FIXED_ON_RESUME) and new.get(key) != old.get(key):
            raise ConfigError(f"{key}={new.get(key)}: can't be changed on resume", "start a new run")
    keep_text_of_old_run(config, run, overrides)
    return config


def began(run: Path) -> bool:
    """Return whether a run has saved a checkpoint; unsharded runs save the first one at step 0."""
    return any((run / name).is_file() for name in (LAST, PREVIOUS))


def is_complete(config: Config, run: Path) -> bool:
    """Return whether a run has finished its last step and written its summary."""
    if not (run / LAST).is_file():
        return False
    checkpoint = read_checkpoint(run / LAST)
    tokens = checkpoint["TextDataModule"]["samples_seen"] * config.model.max_length
    at_end = int(checkpoint["global_step"]) >= config.trainer.max_steps
    return at_end and read_summary(run).get("tokens_seen") == tokens


def check_resumable(config: Config, run: Path, source: Path = LAST, *, verify: bool = True) -> int:
    """Return the step of the checkpoint that ``run`` resumes from.

    Args:
        config: The full configuration.
        run: Folder of the run.
        source: Checkpoint to resume from, relative to ``run``.
        verify: Whether to verify the checksums, which reads the whole file; one rank is enough.

    Raises:
        CheckpointError: If the checkpoint is missing or corrupt; the message suggests another one that is
            intact. Also if the run is complete.
        ConfigError: If ``trainer.max_steps`` is below the step of the checkpoint.
    """
    if not began(run):
        path = run / "config.yaml"
        settings = ["--config", str(path)] if path.is_file() else []
        raise CheckpointError(
            f"{run}: ended before its first checkpoint",
            f"start it again with: {command('train', *settings)}",
        )
    try:
        step = int((read_intact if verify else read_checkpoint)(run / source)["global_step"])
    except CheckpointError as error:
        raise CheckpointError(error.reason, _advice(run, source)) from None
    if source == LAST and is_complete(config, run):
        raise CheckpointError(
            f"{run}: is complete at step {step}", f"to continue, set trainer.max_steps=N with N above {step}"
        )
    if config.trainer.max_steps < step:
        raise ConfigError(
            f"trainer.max_steps={config.trainer.max_steps}: {run} is at step {step} already",
            f"set it to {step} or more",
        )
    return step


def begin_at(run: Path, source: Path, step: int) -> None:
    """Make ``source`` the last checkpoint, and delete temporary files of killed processes and later samples.

    If the run resumes from another checkpoint than last.ckpt, last.ckpt is kept as replaced.ckpt.

    Args:
        run: Folder of the run.
        source: Checkpoint to resume from, relative to ``run``.
        step: Optimizer step of ``source``.
    """
    for left in [*run.glob(".*.tmp"), *(run / LAST.parent).glob(".*.tmp")]:
        if left.is_file():
            left.unlink()
    if source != LAST:
        if (run / LAST).is_file():
            second_name(run / LAST, run / REPLACED)
        second_name(run / source, run / LAST)
    _trim_samples(run / "samples.txt", step)


def _advice(run: Path, source: Path) -> str:
    for name, other in SOURCES.items():
        if other != source and (run / other).is_file():
            try:
                step = int(read_intact(run / other)["global_step"])
            except CheckpointError:
                continue
            return (
                f"{run / other} of step {step} is intact; resume from it with: "
                f"{command('train', '--resume', run, '--from', name)}"
            )
    return f"no other is intact; start again with: {command('train', '--config', run / 'config.yaml')}"


def _trim_samples(path: Path, step: int) -> None:
    """Delete samples of later steps, which will be generated again."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for header in re.finditer(r"^--- step (\d+)$", text, flags=re.MULTILINE):
        if int(header[1]) > step:
            write_text(path, text[: header.start()])
            return
