"""Compiled steps of a tiny converted model, and their comparison with plain layers."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.models import FAMILIES, tiny_config
from tnnlm.checkpoints.converted import ConvertedModel, model_fingerprint
from tnnlm.conversion import convert_model
from tnnlm.inference.aot import compile_step
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.linear import replace_linears
from tnnlm.inference.row_linear import RowLinear
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import train_bpe

METHODS = {"balanced": "tno", "window": "sgconv", "companion": "rtf", "multirate": "sgconv"}


def converted(method: str = "balanced") -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(tiny_config(kernel=FAMILIES[METHODS[method]](), d_model=32)).eval()
    return convert_model(model, method=method)


def compile_converted(dtype: str, method: str = "balanced") -> None:
    """Compile the step of :func:`converted` into ``out``."""
    model = converted(method)
    compile_step(model, Path("out"), dtype, model_fingerprint(model))


def whole(model: CausalLM) -> ConvertedModel:
    return ConvertedModel(model, train_bpe(["the cat sat"], 300, "<eos>", 1, False), model_fingerprint(model))


def assert_steps_round_the_weights_alone(engine: TextGenerator, dtype: str) -> None:
    """Assert that the steps of ``engine`` equal those of plain layers with rounded weights."""
    rounded = converted()
    replace_linears(rounded, lambda weight, bias: RowLinear(weight, bias, dtype))
    state, expected_state = engine.model.init_state(1), rounded.init_state(1)
    with torch.inference_mode():
        for token in torch.randint(300, (20, 1)):
            logits, state = engine.model.step(token, state)
            expected, expected_state = rounded.step(token, expected_state)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
