"""Compiled batches: any number of rows, states in place, and one copy of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.compilers import needs_gxx
from tests.support.steps import METHODS, converted, whole
from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.errors import UserError
from tnnlm.inference import aot
from tnnlm.inference.aot import CompiledModel, _Step, compile_batch, compile_step, load_batch_step
from tnnlm.inference.batch_step import BatchStep
from tnnlm.inference.engine import open_engine
from tnnlm.inference.linear import replace_linears
from tnnlm.inference.linear_choice import choose_batch_linear, choose_linear
from tnnlm.machine.capabilities import WITHOUT
from tnnlm.models.causal_lm import ModelState


def assert_equal_states(state: ModelState, expected: ModelState, atol: float = 0.0) -> None:
    for part, reference in zip(state.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(part, reference, rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_batches_in_place_equal_the_plain_steps(method: str) -> None:
    """The compilation itself is tested below: the packages are replaced by what they compile."""
    plain = converted(method)
    model = CompiledModel(plain, _Step(plain), BatchStep(plain))
    prompts, lengths = torch.randint(300, (3, 40)), torch.tensor([40, 3, 17])
    state = expected = plain.prefill(prompts, plain.init_state(3), lengths)[1]
    for position, tokens in enumerate(torch.randint(300, (40, 3))):
        before = state.copy()
        step = model.step if position % 2 else model.step_in_place
        given = state if position % 2 else state.copy()
        logits, after = step(tokens, given)
        reference, expected = plain.step(tokens, expected)
        torch.testing.assert_close(logits, reference, rtol=0, atol=1e-5)
        assert_equal_states(after, expected, atol=1e-5)
        assert_equal_states(state, before)
        state = after


@torch.inference_mode()
def test_rows_that_are_not_active_keep_their_state() -> None:
    plain = converted()
    model = CompiledModel(plain, _Step(plain), BatchStep(plain))
    state = plain.prefill(torch.randint(300, (3, 5)), plain.init_state(3))[1]
    active = torch.tensor([True, False, True])
    _, after = model.step(torch.tensor([1, 2, 3]), state, active)
    assert_equal_states(after.select(torch.tensor([1])), state.select(torch.tensor([1])))


@needs_gxx
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@torch.inference_mode()
def test_compiled_batches_give_the_logits_of_the_plain_steps(dtype: str) -> None:
    choice = choose_batch_linear(dtype)
    if choice is None:
        pytest.skip("no products that can be compiled")
    plain = converted()
    fingerprint = model_fingerprint(plain)
    compile_step(converted(), Path("out"), dtype, fingerprint)
    package = compile_batch(converted(), Path("out"), dtype, fingerprint)
    weight = plain.embedding.weight.numpy().tobytes()[:64]
    assert weight not in package.read_bytes()
    engine, info = open_engine(whole(converted()), Path("out"), dtype=dtype)
    assert str(info) == f"compiled engine, cpu, {dtype}, also for batches"
    assert info.batch_invariant
    model = engine.model
    replace_linears(plain, choice.make)
    seen: dict[int, torch.Tensor] = {}
    for rows in (2, 3, 5, 16, 63):
        torch.manual_seed(1)
        state = expected_state = plain.init_state(rows)
        tokens = torch.randint(300, (63, 12))[:rows].T.contiguous()
        # An input halfway between two integers may be rounded to either, which later layers amplify.
        atol = 1e-4 if dtype == "float32" else 2e-2
        for column in tokens:
            logits, state = model.step_in_place(column, state.copy() if state is expected_state else state)
            expected, expected_state = plain.step(column, expected_state)
            torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
        assert_equal_states(state, expected_state, atol=atol)
        seen[rows] = logits[:2]
    # A row has the same bits in any batch.
    for logits in seen.values():
        assert torch.equal(logits, seen[2])


def test_only_missing_steps_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(aot, "compile_step", lambda *_: compiled.append("step"))
    monkeypatch.setattr(aot, "compile_batch", lambda *_: compiled.append("batch"))
    lines: list[str] = []
    aot.compile_missing(converted(), Path("out"), "float32", "abc", lines.append)
    batches = choose_linear(torch.device("cpu"), "float32").name == "oneDNN"
    assert compiled == ["step", "batch"][: 1 + batches]
    assert len(lines) == len(compiled)
    aot.compile_missing(converted(), Path("out"), "int8", "abc", lines.append)
    assert compiled[-1] == ("step" if choose_batch_linear("int8") is None else "batch")
    made = len(compiled)
    monkeypatch.setattr(aot, "check_package", lambda *_: None)
    aot.compile_missing(converted(), Path("out"), "float32", "abc", lines.append)
    assert len(lines) == len(compiled) == made


def test_dtype_without_a_product_that_compiles_is_refused() -> None:
    with pytest.raises(UserError, match="no compiled batch for float16"):
        compile_batch(converted(), Path("out"), "float16", "abc")
    assert not Path("out").exists()


def test_package_of_batches_is_not_used_without_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WITHOUT, "onednn_float32")
    Path("batch-float32.pt2").touch()
    assert load_batch_step(converted(), converted(), Path(), "float32", "abc") is None
