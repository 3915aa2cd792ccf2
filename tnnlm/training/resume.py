"""Resuming a run from its newest intact checkpoint, without the outputs of later steps."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tnnlm.chat.stored import TOKENIZER_CONFIG
from tnnlm.checkpoints.locate import IMPORTED, LAST, PREVIOUS
from tnnlm.checkpoints.membership import FIXED, PLACES
from tnnlm.checkpoints.settings_file import take_own_tokenizer, verify_settings
from tnnlm.checkpoints.training import ENTRY, read_checkpoint, read_intact
from tnnlm.checksums import not_verified
from tnnlm.config.checks import leaves
from tnnlm.config.loader import config_to_dict, load_config
from tnnlm.config.schema import Config
from tnnlm.config.values import one_line, typed
from tnnlm.data.report import REPORT
from tnnlm.errors import CheckpointError, ConfigError, command
from tnnlm.files import check_no_link, remove_leftovers, write_text
from tnnlm.reading import check_regular
from tnnlm.training.callbacks.checkpoint import second_name
from tnnlm.training.components import LOGGERS, PROFILE
from tnnlm.training.data_check import keep_text_of_old_run
from tnnlm.training.summary import read_summary
from tnnlm.trust import NO_CODE, Trust

SOURCES = {"last": LAST, "previous": PREVIOUS}
"""Values of ``train.py --from`` and the checkpoint that each selects."""
REPLACED = Path("checkpoints") / "replaced.ckpt"
"""Backup of last.ckpt, made when a run resumes from previous.ckpt."""
_FIXED_ON_RESUME = ("name", "runs_dir", *FIXED, "trainer.ema_decay", "optim.optimizer")
_RESUMED = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops", "TextDataModule")
"""Entries of a checkpoint that a run resumes from."""


def resumed_config(run: Path, overrides: list[str], trust: Trust = NO_CODE) -> Config:
    """Return the configuration of a run with overrides from the command line.

    Settings are compared by their values, in whatever way the overrides give them. ``trust`` says whether
    the kernel module of the run may run although this machine hasn't run it before.

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
    if not os.path.lexists(path):
        raise CheckpointError(f"{run}: has no config.yaml to resume from", "start the run again")
    verified = verify_settings(run)
    recorded = load_config(path, saved=True, trust=trust)
    _check_recorded(run, recorded)
    if not verified:
        not_verified(path)
    try:
        config = load_config(path, overrides, saved=True, trust=trust)
    except ConfigError:
        word = _unfitting_change(path, overrides, recorded, trust)
        if word is None:
            raise
        raise ConfigError(f"{word}: can't be changed on resume", "start a new run") from None
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
            given = f"{key}={one_line(typed(new.get(key)))}"
            raise ConfigError(f"{given}: can't be changed on resume", "start a new run")
    keep_text_of_old_run(config, run, overrides)
    take_own_tokenizer(config, run)
    return config


def _unfitting_change(path: Path, overrides: list[str], recorded: Config, trust: Trust) -> str | None:
    """Return the override of a fixed setting that doesn't fit the other settings of the run, or None.

    Raises:
        ConfigError: If the other overrides are invalid by themselves.
    """
    known = {key for key, _, _ in leaves(recorded)}
    known |= {key[:end] for key in known for end, letter in enumerate(key) if letter == "."}

    def fixed(word: str) -> bool:
        key = word.partition("=")[0].strip()
        return key in known and f"{key}.".startswith(_FIXED_ON_RESUME)

    accepted = [word for word in overrides if not fixed(word)]
    load_config(path, accepted, saved=True, trust=trust)
    for word in filter(fixed, overrides):
        accepted.append(word)
        try:
            load_config(path, accepted, saved=True, trust=trust)
        except ConfigError:
            return word
    return None


def _check_recorded(run: Path, recorded: Config) -> None:
    """Check the config.yaml of a run against its checkpoint, which contains the configuration as well.

    A truncated file is valid YAML, and settings that it lacks would have their defaults.

    Raises:
        CheckpointError: If config.yaml lacks the last setting, or differs in a setting that is fixed.
    """
    path = run / "config.yaml"
    saved = next((run / name for name in (LAST, PREVIOUS) if (run / name).is_file()), None)
    try:
        stored = _flat(read_checkpoint(saved)[ENTRY]["config"]) if saved else {}
    except CheckpointError:
        return  # check_resumable reports it, with an intact checkpoint to resume from
    if not stored:
        return
    last = list(stored)[-1]
    if not re.search(rf"\b{last.rpartition('.')[2]}\W", path.read_text(encoding="utf-8")):
        raise CheckpointError(f"{path}: is truncated, without {last}", "restore it, or start a new run")
    values = {key: value for key, value in _flat(config_to_dict(recorded)).items() if key not in PLACES}
    for key, value in values.items():
        if key.startswith(_FIXED_ON_RESUME) and stored.get(key, value) != value:
            raise CheckpointError(
                f"{path}: has {key}={value}, but {saved} has {stored[key]}", "restore config.yaml"
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their full keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def began(run: Path) -> bool:
    """Return whether a run has saved a checkpoint; unsharded runs save the first one at step 0."""
    return any(os.path.lexists(run / name) for name in (LAST, PREVIOUS))


def is_complete(config: Config, run: Path) -> bool:
    """Return whether a run has finished its last step and written its summary."""
    if not (run / LAST).is_file():
        return False
    checkpoint = read_checkpoint(run / LAST)
    if "TextDataModule" not in checkpoint:  # another trainer saved it
        return False
    position = checkpoint["TextDataModule"]
    tokens = position.get("tokens_seen", position["samples_seen"] * config.model.max_length)
    at_end = int(checkpoint["global_step"]) >= config.trainer.max_steps
    return at_end and read_summary(run).get("tokens_seen") == tokens


def check_outputs(run: Path) -> None:
    """Check that what a training writes into the folder of its run stays in it.

    A folder there that is a symbolic link leads to any folder of the user if the run is a stranger's. The
    folder of the run itself may be a link, and files that are links are replaced when they are written,
    except logs.

    Raises:
        UserError: If a folder of checkpoints or logs is a link, or has a log that is a link to another place.
        CheckpointError: If an output that is read on resume is no regular file.
    """
    logs = [run / name for name in ("tensorboard", "wandb", LOGGERS, PROFILE)]
    for folder in (run / LAST.parent, *logs):
        check_no_link(folder, "put the folder itself in its place, or link the folder of the whole run")
    for folder in logs:
        for path in folder.rglob("*"):
            # W&B links to its latest run, inside. Libraries write the logs, and follow links.
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(
                os.path.realpath(folder)
            ):
                check_no_link(path, "delete the link")
    for name in ("metrics.csv", "summary.json", "config.yaml", "tokenizer.json", TOKENIZER_CONFIG, REPORT):
        if os.path.lexists(run / name):
            check_regular(run / name, "move it to another place")


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
    check_outputs(run)
    if not began(run):
        path = run / "config.yaml"
        settings = ["--config", str(path)] if path.is_file() else []
        raise CheckpointError(
            f"{run}: ended before its first checkpoint",
            f"start it again with: {command('train', *settings)}",
        )
    try:
        step = _step(run / source, verify)
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
    for folder in (run, run / LAST.parent):
        # Only the process that holds the lock of the run writes files there; convert.py writes folders.
        remove_leftovers(folder, owned="*")
        for left in folder.glob(".*.tmp"):
            # Earlier versions named them by the number of the process alone.
            if left.is_file() and re.fullmatch(r"\..+\.\d+\.tmp", left.name):
                left.unlink()
    if source != LAST:
        if (run / LAST).is_file():
            second_name(run / LAST, run / REPLACED)
        second_name(run / source, run / LAST)
    _trim_samples(run / "samples.txt", step)


def repeated_steps(run: Path, checkpoint: Path | None, step: int) -> list[str]:
    """Return a warning if a run resumes from an earlier checkpoint than last.ckpt; otherwise nothing.

    Args:
        run: Folder of the run.
        checkpoint: Checkpoint to resume from; None for a new run.
        step: Optimizer step of ``checkpoint``.
    """
    if checkpoint is None or checkpoint == run / LAST:
        return []
    try:
        end = int(read_checkpoint(run / LAST)["global_step"])
    except (CheckpointError, KeyError):  # last.ckpt is damaged, and how far it came is unknown
        return []
    repeated = f"steps {step + 1:,} to {end:,} will be repeated"
    return [f"warning: {checkpoint} is of step {step:,}; {repeated}"] if end > step else []


def _step(path: Path, verify: bool = True) -> int:
    """Return the step of a checkpoint that a run can be resumed from; ``verify`` reads its whole file.

    Raises:
        CheckpointError: If the checkpoint is missing or corrupt, or if another trainer saved it.
    """
    checkpoint = (read_intact if verify else read_checkpoint)(path)
    for entry in _RESUMED:
        if entry not in checkpoint:
            raise CheckpointError(f"{path}: was not saved by train.py, it lacks {entry}")
    return int(checkpoint["global_step"])


def _advice(run: Path, source: Path) -> str:
    for name, other in SOURCES.items():
        if other != source and (run / other).is_file():
            try:
                step = _step(run / other)
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
