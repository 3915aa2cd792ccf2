"""Logging to Weights & Biases, with one W&B run per run folder, also after resuming."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from tnnlm.config.loader import config_to_dict
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, ConfigError, install_command
from tnnlm.files import write_text
from tnnlm.reading import read_text

ID_FILE = "wandb_id"
"""File in a run's folder with the id of the W&B run."""
_LARGEST = 256
"""Largest number of bytes of this file."""
_REMEDY = "delete it to log to a new W&B run"


class WandbRun(WandbLogger):
    """WandbLogger that finishes its W&B run when training ends, so that the next one starts separately."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send the remaining data and finish the W&B run."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def wandb_logger(config: Config, folder: Path) -> WandbRun:
    """Start or resume the W&B run of ``folder``.

    With WANDB_MODE=offline data is stored locally, and ``wandb sync`` uploads it later.

    Raises:
        ConfigError: If the package is not installed, or if the service can't be reached or rejects the login.
        CheckpointError: If the file with the id is damaged.
    """
    asked = f"trainer.wandb={config.trainer.wandb}"
    path = folder / ID_FILE
    identity = _known_id(path) or uuid.uuid4().hex[:8]
    try:
        logger = WandbRun(
            project=config.trainer.wandb, name=folder.name, id=identity, resume="allow", save_dir=folder
        )
    except ModuleNotFoundError:
        raise ConfigError(f"{asked}: needs the package wandb", f"run: {install_command('wandb')}") from None
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            logger.log_hyperparams(config_to_dict(config))
        except Exception as error:  # wandb raises many types of errors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{asked}: {reason}", "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        write_text(path, identity + "\n")
    return logger


def _known_id(path: Path) -> str:
    """Return the id in a run's file, which may be a stranger's; empty if there is none.

    Raises:
        CheckpointError: If it is not a short word in a regular file.
    """
    if not os.path.lexists(path):
        return ""
    text = read_text(path, _REMEDY, largest=_LARGEST).strip()
    if not re.fullmatch(r"[\w.-]*", text, re.ASCII):
        raise CheckpointError(f"{path}: is damaged (not the id of a W&B run)", _REMEDY)
    return text
