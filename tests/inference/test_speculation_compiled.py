"""Compiled passes over several tokens: logits and states, rollback across turns, and one compilation."""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from tests.support.compilers import needs_gxx
from tests.support.steps import METHODS, converted, whole
from tnnlm.inference import speculation_compiled
from tnnlm.inference.aot import CompiledModel, compile_step
from tnnlm.inference.row_linear import row_linear
from tnnlm.inference.speculation_compiled import (
    EachRow,
    PassLinear,
    SpeculativeModel,
    _Pass,
    compile_pass,
    open_with_passes,
)
from tnnlm.trust import NO_CODE

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_passes_equal_single_steps_after_partial_acceptance(method: str) -> None:
    """The compilation itself is tested below: the packages are replaced by what they compile."""
    plain = converted(method)
    model = SpeculativeModel(plain, plain, {4: _Pass(plain)})
    state = expected = plain.init_state(1)
    for turn, tokens in enumerate(torch.randint(300, (20, 1, 4))):
        logits, states = model.steps(tokens, state)
        assert len(states) == len(states[:]) == 4
        accepted = turn % 4
        for place in range(accepted + 1):
            single, expected = plain.step(tokens[:, place], expected)
            torch.testing.assert_close(logits[:, place], single, rtol=0, atol=1e-4)
        state = states[accepted]
        for part, other in zip(state.tensors, expected.tensors, strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_rows_and_widths_without_a_package_run_in_the_model() -> None:
    plain = converted()
    model = SpeculativeModel(plain, plain, {4: _Pass(plain)})
    assert model.widths == (1, 4)
    for rows, width in ((1, 3), (2, 4)):
        tokens, state = torch.randint(300, (rows, width)), plain.init_state(rows)
        assert torch.equal(model.steps(tokens, state)[0], plain.steps(tokens, state)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@torch.inference_mode()
def test_layers_of_a_pass_equal_those_of_a_row(dtype: str) -> None:
    weight, bias, x = torch.randn(8, 16), torch.randn(8), torch.randn(1, 3, 16)
    single = row_linear(weight, bias, dtype)
    expected = torch.cat([single(x[:, place]) for place in range(3)])
    for layer in (EachRow(single), PassLinear(weight, bias, dtype)):
        torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-5)


@needs_gxx
@torch.inference_mode()
def test_compiled_passes_give_the_logits_of_the_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation_compiled, "PASS_WIDTHS", (3,))
    model = whole(converted())
    compile_step(converted(), Path("out"), "float32", model.fingerprint)
    generator, info = open_with_passes(
        whole(converted()), Path("out"), device=CPU, dtype="float32", engine="auto", trust=NO_CODE
    )
    assert info.name == "compiled"
    assert "convert.py --compile speculate" in info.reason
    threads = torch.get_num_threads()
    path = compile_pass(converted(), Path("out"), "float32", model.fingerprint, 3)
    weight = converted().embedding.weight.numpy().tobytes()[:64]
    assert weight not in path.read_bytes()
    with ZipFile(path) as package:
        (kernel,) = (name for name in package.namelist() if name.endswith("kernel.cpp"))
        source = package.read(kernel).decode()
    assert "tmp_acc2" in source  # weights are read once, for three sums
    # It runs with the threads of the process that calls it, not of the one that compiled it.
    assert "#pragma omp parallel\n" in source or os.cpu_count() == 1
    assert "num_threads(" not in source
    assert torch.get_num_threads() == threads
    generator, info = open_with_passes(
        model, Path("out"), device=CPU, dtype="float32", engine="auto", trust=NO_CODE
    )
    assert isinstance(generator.model, SpeculativeModel)
    assert isinstance(generator.model.model, CompiledModel)
    assert info.reason == ""
    state = expected = generator.model.init_state(1)
    for tokens in torch.randint(300, (5, 1, 3)):
        logits, states = generator.model.steps(tokens, state)
        for place in range(3):
            single, expected = generator.model.step(tokens[:, place], expected)
            torch.testing.assert_close(logits[:, place], single, rtol=0, atol=1e-5)
        state = states[2]
