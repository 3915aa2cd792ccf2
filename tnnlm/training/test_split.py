"""Scores of the best checkpoint on the test split, computed once at the end of a classification run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tnnlm.checkpoints.locate import find_checkpoint
from tnnlm.checkpoints.training import load_encoder
from tnnlm.config.schema import Config
from tnnlm.data.sequences.prepare import prepare_sequences
from tnnlm.data.sequences.rows import LabelledRows
from tnnlm.evaluation import Scores, class_scores
from tnnlm.models.batches import LabelledBatch
from tnnlm.models.encoders import SequenceClassifier


def score_rows(model: nn.Module, rows: LabelledRows, batch_size: int, device: torch.device) -> Scores:
    """Classify every row of a data set, in order, and return the total scores.

    Args:
        model: Module on ``device`` that returns logits for (tokens, lengths), such as
            :class:`tnnlm.models.encoders.SequenceClassifier`.
        rows: Data set to classify.
        batch_size: Rows per batch.
        device: Device to run on.
    """
    was_training = model.training
    model.eval()
    parts = []
    for batch in tqdm(DataLoader(rows, batch_size=batch_size), desc="test", leave=False, disable=None):
        parts.append(class_scores(model, LabelledBatch(*(tensor.to(device) for tensor in batch))))
    model.train(was_training)
    return Scores(*(sum(values) for values in zip(*parts, strict=True)))


def final_scores(run: Path, config: Config, device: torch.device) -> dict[str, float]:
    """Return the test metrics of a run's best checkpoint.

    ``test/loss`` is in nats per sequence. ``test/majority`` is the accuracy of always predicting the most
    frequent class of the test split, a baseline for ``test/accuracy``.
    """
    model = load_encoder(find_checkpoint(str(run), run.parent)).model.to(device)
    assert isinstance(model, SequenceClassifier)
    rows = prepare_sequences(config).split("test", config.model.max_length)
    scores = score_rows(model, rows, config.data.batch_size, device)
    return {
        "test/loss": scores.mean,
        "test/accuracy": scores.accuracy,
        "test/majority": rows.majority,
    }
