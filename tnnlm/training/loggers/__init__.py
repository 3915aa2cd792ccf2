"""Where metrics go: metrics.csv and plain lines, Weights & Biases."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger


class LocalLogger(Logger):
    """A logger without a name and a version, which Lightning asks for; config.yaml has the settings."""

    name = ""
    version = ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""
