"""The step of a single row with few operators equals the step of the modules."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import FAMILIES, tiny_config
from tnnlm.conversion import convert_model
from tnnlm.inference.aot import CompiledModel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.row_step import RowStep


def converted(family: str = "tno", block: str = "tnn", **recipe: object) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(tiny_config(kernel=FAMILIES[family](), d_model=32, block=block)).eval()
    return convert_model(model, **recipe)  # type: ignore[arg-type]


RECIPES: dict[str, dict[str, object]] = {
    "balanced": {"method": "balanced"},
    "balanced with a window": {"method": "balanced", "window_taps": 4},
    "window": {"method": "window"},
}
"""Settings of conversions by name."""


@pytest.mark.parametrize("name", RECIPES)
@torch.inference_mode()
def test_row_step_equals_the_step_of_the_modules(name: str) -> None:
    plain = converted(**RECIPES[name])
    assert RowStep.covers(plain)
    model = CompiledModel(plain, RowStep(plain))
    prompt = torch.randint(300, (1, 9))
    state = expected_state = plain.prefill(prompt, plain.init_state(1))[1]
    other = before = plain.init_state(1)
    for token in torch.randint(300, (20, 1)):
        logits, state = model.step(token, state)
        expected, expected_state = plain.step(token, expected_state)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
        _, other = model.step(token, before)  # another sequence in between, from the same state each time
    for part, reference in zip(state.tensors, expected_state.tensors, strict=True):
        torch.testing.assert_close(part, reference, rtol=1e-4, atol=1e-4)
    assert not any(part.any() for part in before.tensors)
    for part, reference in zip(other.tensors, plain.step(token, before)[1].tensors, strict=True):
        torch.testing.assert_close(part, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "method"), [("rtf", "companion"), ("sgconv", "multirate"), ("tno", "etsc")]
)
def test_other_recurrences_are_left_to_the_modules(family: str, method: str) -> None:
    assert not RowStep.covers(converted(family, method=method))


def test_other_layers_are_left_to_the_modules() -> None:
    assert not RowStep.covers(converted(block="s4", method="balanced"))
