"""Lookup of runs, checkpoints and converted models by name, path or modification time."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from tnnlm.checkpoints.converted import ConvertedModel, is_converted, load_converted
from tnnlm.checkpoints.training import TrainedCheckpoint, from_attached, load_checkpoint
from tnnlm.errors import CheckpointError, command
from tnnlm.files import restore_replaced
from tnnlm.trust import NO_CODE, Trust

BEST = Path("checkpoints") / "best.ckpt"
LAST = Path("checkpoints") / "last.ckpt"
PREVIOUS = Path("checkpoints") / "previous.ckpt"
"""Previous last.ckpt, kept as a backup."""
CONVERTED = Path("converted")
IMPORTED = Path("import.json")
"""Record of the origin of imported weights; a run that was trained has none."""


def find_run(name: str | None, runs_dir: Path) -> Path:
    """Return the folder of a run, given by path or by name under ``runs_dir``; None selects the newest run.

    Raises:
        CheckpointError: If the run doesn't exist.
    """
    if name is None:
        newest = _newest(runs_dir.glob(f"*/{LAST}"))
        if newest is None:
            raise CheckpointError(
                f"{runs_dir}: contains no run with a checkpoint", f"train one with: {command('train')}"
            )
        return newest.parents[1]
    for candidate in (Path(name), runs_dir / name):
        # A run that was killed before its first checkpoint has only config.yaml.
        if (candidate / "checkpoints").is_dir() or (candidate / "config.yaml").is_file():
            return candidate
    raise CheckpointError(
        f"{name}: no such run, neither as a folder nor under {runs_dir}/", _similar(name, runs_dir)
    )


def _similar(name: str, runs_dir: Path) -> str:
    """Return the remedy for a run that doesn't exist: the run with a similar name, or how to get one."""
    known = [path.name for path in runs_dir.glob("*") if path.is_dir() and not path.name.startswith(".")]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"pass the path of its folder, or train one with: {command('train')}"


def find_checkpoint(target: str | None, runs_dir: Path) -> Path:
    """Return a checkpoint given by path, or the best checkpoint of a run.

    Without a validated checkpoint, it is the last one of the run.

    Raises:
        CheckpointError: If the checkpoint or the run doesn't exist, or the run has no checkpoint yet.
    """
    if target is not None and Path(target).is_file():
        return Path(target)
    if target is not None and target.endswith(".ckpt"):
        raise CheckpointError(f"{target}: no such checkpoint", "give the path of a checkpoint or of a run")
    run = find_run(target, runs_dir)
    for name in (BEST, LAST):
        if os.path.lexists(run / name):  # what is no file there is refused when it is read
            return run / name
    raise CheckpointError(f"{run}: has no checkpoint yet", "wait until its training has saved one")


def load_trained(
    path: str | Path | None = None, *, runs_dir: str | Path = "runs", trust: Trust = NO_CODE
) -> TrainedCheckpoint:
    """Load a trained model in its parallel form on the CPU, to convert, evaluate or fine-tune it.

    Args:
        path: Path of a checkpoint, or path or name of a run, whose best checkpoint is loaded. None selects
            the newest run.
        runs_dir: Folder that contains the runs.
        trust: Whether the module of a custom kernel may run although this machine hasn't run it before.

    Returns:
        Model, tokenizer, configuration and step of the checkpoint.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or not a causal language model.
    """
    return load_checkpoint(find_checkpoint(None if path is None else str(path), Path(runs_dir)), trust)


def load_for_decoding(
    target: str | None, runs_dir: Path, trust: Trust = NO_CODE
) -> tuple[Path, ConvertedModel]:
    """Load a model for decoding from a converted model, a run or a checkpoint with attached recurrences.

    Args:
        target: Path of a converted model or a checkpoint, or path or name of a run. None selects the newest
            converted model.
        runs_dir: Folder that contains the runs.
        trust: Whether the kernel module of a checkpoint may run; a converted model needs none.

    Returns:
        Path that was loaded, and the model.

    Raises:
        CheckpointError: If nothing is found, or the model isn't converted.
    """
    path = find_for_decoding(target, runs_dir)
    return path, load_converted(path) if path.is_dir() else from_attached(load_checkpoint(path, trust))


def find_for_decoding(target: str | None, runs_dir: Path) -> Path:
    """Return the path that :func:`load_for_decoding` loads: a converted folder, or a checkpoint.

    Raises:
        CheckpointError: If nothing is found.
    """
    return _find_converted(target, runs_dir) or find_checkpoint(target, runs_dir)


def outdated(target: str | None, runs_dir: Path) -> str | None:
    """Return a warning if the run of a converted model has a newer best checkpoint than the model.

    Args:
        target: Target of :func:`load_for_decoding`, which selects the converted model.
        runs_dir: Folder that contains the runs.

    Returns:
        Warning in one line, which names both and the command that converts again; None if the model is newer,
        belongs to no run, or is not a converted folder.

    Raises:
        CheckpointError: If nothing is found.
    """
    folder = _find_converted(target, runs_dir)
    if folder is None:
        return None
    weights, run = folder / "model.safetensors", folder.parent
    best = next((run / name for name in (BEST, LAST) if (run / name).is_file()), None)
    if best is None or not weights.is_file() or weights.stat().st_mtime >= best.stat().st_mtime:
        return None
    place = [] if folder.name == str(CONVERTED) else ["--out", str(folder)]
    return f"{folder}: is older than {best}; convert again with: {command('convert', run, *place, '--force')}"


def _find_converted(target: str | None, runs_dir: Path) -> Path | None:
    """Return the converted model that a target of :func:`load_for_decoding` selects; None for a checkpoint.

    Raises:
        CheckpointError: If the target doesn't exist, or is neither a converted model nor a run.
    """
    if target is None:
        newest = _newest(runs_dir.glob(f"*/{CONVERTED}/conversion.json"))
        return None if newest is None else newest.parent
    folder = Path(target)
    restore_replaced(folder)
    if (folder / "config.json").is_file() or is_converted(folder):
        return folder
    if folder.is_dir() and not (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"{folder}: is neither a converted model nor a run", "give a folder that convert or train wrote"
        )
    if folder.is_file() or target.endswith(".ckpt"):
        return None
    converted = find_run(target, runs_dir) / CONVERTED
    restore_replaced(converted)
    return converted if is_converted(converted) else None


def find_converted(target: str, runs_dir: Path) -> Path:
    """Return the converted folder that is given by path, or as that of a run.

    Raises:
        CheckpointError: If there is none.
    """
    folder = _find_converted(target, runs_dir)
    if folder is None or not is_converted(folder):
        raise CheckpointError(
            f"{target}: holds no converted model", f"convert it with: {command('convert', target)}"
        )
    return folder


def _newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)
