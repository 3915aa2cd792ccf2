"""Registry of the model class of each task."""

from __future__ import annotations

from tnnlm.config.schema import Config
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM, SequenceClassifier

MODELS: dict[str, type[CausalLM | MaskedLM | SequenceClassifier]] = {
    "causal": CausalLM,
    "masked": MaskedLM,
    "classify": SequenceClassifier,
}
"""Model class of each task; each class has a method ``loss(batch)``."""


def build_model(config: Config) -> CausalLM | MaskedLM | SequenceClassifier:
    """Build the untrained model for ``config.task``."""
    return MODELS[config.task](config.model)
