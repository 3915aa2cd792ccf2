"""Logging to Weights & Biases, if asked for: one run there for one folder here, however often resumed."""

from __future__ import annotations

import uuid
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from tnnlm.config.loader import config_to_dict
from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.files import write_text

ID_FILE = "wandb_id"
"""in a run's folder"""


class WandbRun(WandbLogger):
    """Lightning's logger; closes its run when training ends, so that the next one gets its own."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def wandb_logger(config: Config, folder: Path) -> WandbRun:
    """Start, or continue, the run that ``folder`` belongs to.

    With WANDB_MODE=offline nothing leaves the machine; ``wandb sync`` sends it later.

    Raises:
        ConfigError: if the package is missing, or its service can't be reached or refuses.
    """
    asked = f"trainer.wandb={config.trainer.wandb}"
    path = folder / ID_FILE
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    identity = known or uuid.uuid4().hex[:8]
    try:
        logger = WandbRun(
            project=config.trainer.wandb, name=folder.name, id=identity, resume="allow", save_dir=folder
        )
    except ModuleNotFoundError:
        raise ConfigError(f"{asked}: needs the package wandb", "pip install 'tnnlm[wandb]'") from None
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            logger.log_hyperparams(config_to_dict(config))
        except Exception as error:  # of its own many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{asked}: {reason}", "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        write_text(path, identity + "\n")
    return logger
