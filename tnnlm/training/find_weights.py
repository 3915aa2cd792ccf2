"""Lookup of the weights that ``init.weights`` names: a run, a checkpoint, a converted folder, or the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from tnnlm.checkpoints.converted import is_converted
from tnnlm.checkpoints.locate import find_checkpoint
from tnnlm.checkpoints.manifest import CHECKSUMS, KERNELS, WEIGHTS
from tnnlm.errors import CheckpointError, one_line
from tnnlm.files import restore_replaced

FILES = (
    "config.json",
    "conversion.json",
    "tokenizer.json",
    "tokenizer_config.json",
    WEIGHTS,
    KERNELS,
    CHECKSUMS,
)
"""Files of a converted folder that are downloaded; none of them is code."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_weights(target: str, runs_dir: Path) -> Path:
    """Return the checkpoint or the converted folder that ``init.weights`` names.

    A run gives its best checkpoint. A name ``OWNER/NAME`` without such a run or file, whose folder OWNER
    doesn't exist, is looked up on the Hugging Face Hub.

    Raises:
        CheckpointError: If there is nothing of this name.
    """
    if not target:
        raise CheckpointError("init.weights: is empty", "write null for random weights")
    folder = Path(target)
    restore_replaced(folder)
    if is_converted(folder):
        return folder
    if is_hub_name(target, runs_dir):
        return _downloaded(target)
    return find_checkpoint(target, runs_dir)


def is_hub_name(target: str, runs_dir: Path) -> bool:
    """Return whether a name without run, file or folder is that of a repository on the Hub."""
    local = Path(target)
    if not _HUB_NAME.fullmatch(target) or target.endswith(".ckpt") or local.parent.is_dir():
        return False
    return not (runs_dir / target).exists()


def _downloaded(name: str) -> Path:
    """Return the local copy of a converted folder on the Hub."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the library raises many classes, for the network and for the name
        reason = one_line(error)
        raise CheckpointError(
            f"init.weights={name}: no such run, file or folder, and not found on the Hub ({reason})",
            "check the name and the network",
        ) from None
    if not is_converted(folder):
        raise CheckpointError(
            f"init.weights={name}: is no folder that convert.py wrote",
            "import other weights with tnnlm import",
        )
    return folder
