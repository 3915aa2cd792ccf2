"""The model of each task."""

from __future__ import annotations

from tnnlm.config.schema import Config
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM, SequenceClassifier

MODELS: dict[str, type[CausalLM | MaskedLM | SequenceClassifier]] = {
    "causal": CausalLM,
    "masked": MaskedLM,
    "classify": SequenceClassifier,
}
"""by task; each has ``loss(batch)``"""


def build_model(config: Config) -> CausalLM | MaskedLM | SequenceClassifier:
    """The untrained model of ``config.task``."""
    return MODELS[config.task](config.model)
