"""Files of a converted folder that describe its model, rewritten as measurements are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.checkpoints.converted import ConvertedModel, check_unchanged, save_report
from tnnlm.checkpoints.training import TrainedCheckpoint
from tnnlm.deployment.card_metadata import Stated
from tnnlm.deployment.model_card import model_card
from tnnlm.errors import collect_failure
from tnnlm.files import write_text


class Description:
    """Files of a converted folder that describe its model: conversion.json and the model card.

    They are written several times, so that the folder is complete at any time, with what is measured by then.
    """

    def __init__(
        self,
        source: TrainedCheckpoint,
        written: ConvertedModel,
        folder: Path,
        stated: Stated,
        prompts: Sequence[str] = (),
    ) -> None:
        self._source = source
        self._fingerprint = written.fingerprint
        self._folder = folder
        self._stated = stated
        self._prompt = next(iter(prompts), "")
        self.failures: dict[str, str] = {}
        """Files that could not be written, and other optional steps that failed, with the reason."""

    def publish(self, report: ModelReport, note: str | None) -> None:
        """Write the report and the model card; ``note`` says why perplexities are not measured."""
        with collect_failure(self.failures, "conversion.json"):
            check_unchanged(self._folder, self._fingerprint)
            save_report(self._folder, report)
        with collect_failure(self.failures, "model card"):
            source = self._source
            card = model_card(
                source.config, source.step, source.model, report, note, self._stated, self._prompt
            )
            check_unchanged(self._folder, self._fingerprint)
            write_text(self._folder / "README.md", str(card))
