"""Converted folders of tiny models."""

from __future__ import annotations

from pathlib import Path

from tests.support.models import tiny_config
from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.checkpoints.converted import save_converted
from tnnlm.conversion import auto_horizon, convert_model, measure
from tnnlm.conversion.source import LayerConversion
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.tokenizer import TextTokenizer

HORIZON = 40


def write_converted(folder: Path, tokenizer: TextTokenizer, method: str = "etsc") -> CausalLM:
    model = CausalLM(tiny_config()).eval()
    converted = convert_model(model, method=method, horizon=HORIZON)
    save_converted(
        folder, converted, tokenizer, measure_model(model, converted, method=method, horizon=HORIZON)
    )
    return converted


def measure_model(model: CausalLM, converted: CausalLM, *, method: str, horizon: int) -> ModelReport:
    """Return the conversion report of a model that is already converted."""
    layers = [LayerConversion(params, method, "as asked") for params in recurrences(converted)]
    return measure(model, layers, method=method, horizon=horizon, seconds=0.0)


def model_horizon(model: CausalLM) -> int:
    """Return the horizon in lags that ``auto`` selects."""
    length = model.config.max_length
    return max(auto_horizon(kernel, length) or length for kernel in kernels(model))
