"""Warnings and tips of Lightning that don't concern users of tnnlm."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Silence Lightning's tips, and warnings about deliberate choices."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # rows come from memory-mapped files
        ".*exists and is not empty.*",  # the run's folder exists before Lightning writes to it
        ".*your dataloader is not resumable.*",  # the sampler restores its position from the checkpoint
        ".*Total length of .* across ranks is zero.*",  # a run that was killed after its last step
        ".*before `optimizer.step.*",  # 16-mixed skips the first steps, which overflow
        ".*callbacks used to create the checkpoint need.*",  # trainer.callbacks may change on resume
        ".*LeafSpec.*is deprecated.*",  # raised by Lightning's code
        ".*WeightAveraging callback with a model that overrides.*",  # it only compiles and shards
    ):
        warnings.filterwarnings("ignore", message=message)
