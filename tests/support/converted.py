"""Converted folders of tiny models."""

from __future__ import annotations

from pathlib import Path

from tests.support.models import tiny_config
from tnnlm.checkpoints.converted import save_converted
from tnnlm.conversion import convert_model, measure_model
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import TextTokenizer

HORIZON = 40


def write_converted(folder: Path, tokenizer: TextTokenizer, method: str = "etsc") -> CausalLM:
    model = CausalLM(tiny_config()).eval()
    converted = convert_model(model, method=method, horizon=HORIZON)
    save_converted(
        folder, converted, tokenizer, measure_model(model, converted, method=method, horizon=HORIZON)
    )
    return converted
