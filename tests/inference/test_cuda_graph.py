"""CUDA graphs: recorded steps, with a fake recorder on the CPU, and on a GPU if there is one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.models import FAMILIES, tiny_config
from tnnlm.conversion import convert_model
from tnnlm.inference.cuda_graph import GraphedModel, GraphRecorder
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import fused_steps
from tnnlm.modules.fused import FusedMixer

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RECORDED: list[int] = []


def again(run: Callable[[], None]) -> Callable[[], None]:
    run()
    RECORDED.append(1)
    return run


def converted(family: str, dtype: torch.dtype = torch.float64) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(tiny_config(kernel=FAMILIES[family]())).to(dtype).eval()
    return convert_model(model, method="multirate" if family == "sgconv" else "etsc")


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NEEDS_GPU))],
)
@pytest.mark.parametrize("family", ["tno", "sgconv"])
@torch.inference_mode()
def test_replayed_steps_equal_plain_ones_and_leave_states_alone(device: str, family: str) -> None:
    RECORDED.clear()
    plain = converted(family).to(device)
    graphed = GraphedModel(plain, None if device == "cuda" else again)
    prompt = torch.randint(300, (3, 9), device=device)
    _, state = graphed.prefill(prompt, graphed.init_state(3))
    kept = [part.clone() for part in state.tensors]
    first, fork = graphed.step(torch.tensor([1, 2, 3], device=device), state)
    current = expected = state
    for token in range(10):
        tokens = torch.full((3,), token, device=device)
        logits, current = graphed.step(tokens, current)
        reference, expected = plain.step(tokens, expected)
        torch.testing.assert_close(logits, reference, rtol=0, atol=1e-10)
    assert len(RECORDED) == (2 if device == "cpu" else 0), "one row at once, three after a few steps"
    for part, before in zip(state.tensors, kept, strict=True):
        assert torch.equal(part, before)
    # An older state still steps as before, and so do single rows and rows that are inactive.
    one = fork.select(torch.tensor([1], device=device))
    torch.testing.assert_close(
        graphed.step(torch.tensor([5], device=device), one)[0],
        plain.step(torch.tensor([5], device=device), one)[0],
        rtol=0,
        atol=1e-10,
    )
    active = torch.tensor([True, False, True], device=device)
    _, paused = graphed.step(torch.tensor([1, 2, 3], device=device), state, active)
    assert torch.equal(paused.layers[0][1][1], state.layers[0][1][1])
    assert first.shape == (3, 300)


@torch.inference_mode()
def test_few_graphs_serve_all_sizes_and_the_least_recently_used_is_freed() -> None:
    RECORDED.clear()
    plain = converted("tno")
    graphed = GraphedModel(plain, again)
    single = weakref.ref(graphed._steps[1])
    state, expected = plain.init_state(32), plain.init_state(32)
    for rows in (32, 31, 9, 5, 3, 2):
        keep = torch.arange(rows)
        state, expected = state.select(keep), expected.select(keep)
        for step in range(4):
            tokens = (torch.arange(rows) + step) % 300
            logits, state = graphed.step(tokens, state)
            reference, expected = plain.step(tokens, expected)
            torch.testing.assert_close(logits, reference, rtol=0, atol=1e-10)
    assert len(RECORDED) == 6, "for 1, 32, 16, 8, 4 and 2 rows"
    assert list(graphed._steps) == [16, 8, 4, 2]
    assert single() is None
    many = plain.init_state(257)
    for _ in range(5):
        graphed.step(torch.zeros(257, dtype=torch.long), many)
    assert len(RECORDED) == 6


def test_graphs_are_captured_and_replayed_on_their_own_gpu_in_one_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current, seen, pools = [0], [], []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    @contextmanager
    def note(*_: Any, pool: Any = None) -> Iterator[None]:
        seen.append(current[-1])
        pools.append(pool)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: seen.append(current[-1]))
    fakes = {
        "device": on,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": note,
        "graph": note,
        "graph_pool_handle": object,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: seen.append(current[-1])),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    record = GraphRecorder(torch.device("cuda:1"))
    for _ in range(2):
        record(lambda: seen.append(current[-1]))()
    assert set(seen) == {1}
    assert pools[1] is not None
    assert pools[1] is pools[3]


@pytest.mark.parametrize("family", ["tno", "sgconv"])
@torch.inference_mode()
def test_a_fused_step_is_the_step_in_place_and_only_within_the_block(family: str) -> None:
    model = converted(family, torch.float32)  # fused modes are float32
    tokens, state = torch.tensor([1, 2, 3]), model.init_state(3)
    _, state = model.prefill(torch.randint(300, (3, 9)), state)
    modules = dict(model.named_modules())
    own = state.select(torch.arange(3))
    active = torch.tensor([True, False, True])
    expected, after = model.step(tokens, state, active)
    with fused_steps(model):
        assert isinstance(model.layers[0].mixer, FusedMixer) == (family == "tno")
        logits, stepped = model.step(tokens, own, active)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    for a, b in zip(stepped.tensors, after.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    if family == "tno":
        assert stepped.layers[0][1] is own.layers[0][1], "updated in place"
    assert dict(model.named_modules()) == modules
