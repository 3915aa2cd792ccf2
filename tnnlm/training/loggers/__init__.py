"""Loggers of metrics: metrics.csv, log lines on the console, and Weights & Biases."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger


class LocalLogger(Logger):
    """Base class of loggers without name and version; config.yaml stores the hyperparameters."""

    name = ""
    version = ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Skip hyperparameters."""
