"""CUDA graphs: recorded steps, with a fake recorder on the CPU, and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.models import FAMILIES, tiny_config
from tnnlm.conversion import convert_model
from tnnlm.inference.cuda_graph import GraphedModel, cuda_graph
from tnnlm.models.causal_lm import CausalLM

RECORDED: list[int] = []


def again(run: Callable[[], None]) -> Callable[[], None]:
    run()
    RECORDED.append(1)
    return run


def converted(family: str) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(tiny_config(kernel=FAMILIES[family]())).eval()
    return convert_model(model, method="multirate" if family == "sgconv" else "etsc")


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
@pytest.mark.parametrize("family", ["tno", "sgconv"])
@torch.inference_mode()
def test_replayed_steps_equal_plain_ones_and_leave_states_alone(device: str, family: str) -> None:
    RECORDED.clear()
    plain = converted(family).to(device)
    graphed = GraphedModel(plain, cuda_graph if device == "cuda" else again)
    prompt = torch.randint(300, (3, 9), device=device)
    _, state = graphed.prefill(prompt, graphed.init_state(3))
    kept = [part.clone() for layer in state.layers for part in layer]
    first, fork = graphed.step(torch.tensor([1, 2, 3], device=device), state)
    current = expected = state
    for token in range(10):
        tokens = torch.full((3,), token, device=device)
        logits, current = graphed.step(tokens, current)
        reference, expected = plain.step(tokens, expected)
        torch.testing.assert_close(logits, reference, rtol=0, atol=1e-5)
    assert len(RECORDED) == (2 if device == "cpu" else 0), "one row at once, three after a few steps"
    for part, before in zip((p for layer in state.layers for p in layer), kept, strict=True):
        assert torch.equal(part, before)
    # An older state still steps as before, and so do single rows and rows that are inactive.
    one = fork.select(torch.tensor([1], device=device))
    torch.testing.assert_close(
        graphed.step(torch.tensor([5], device=device), one)[0],
        plain.step(torch.tensor([5], device=device), one)[0],
        rtol=0,
        atol=1e-5,
    )
    active = torch.tensor([True, False, True], device=device)
    _, paused = graphed.step(torch.tensor([1, 2, 3], device=device), state, active)
    assert torch.equal(paused.layers[0][1][1], state.layers[0][1][1])
    assert first.shape == (3, 300)
