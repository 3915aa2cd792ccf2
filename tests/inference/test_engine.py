"""Engines: packed, low-precision and compiled steps against the plain float32 modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.started import COMPILER, modules_after
from tests.support.steps import (
    METHODS,
    assert_steps_round_the_weights_alone,
    compile_converted,
    converted,
    whole,
)
from tests.support.training_runs import tiny_run
from tnnlm.errors import UserError
from tnnlm.inference.aot import CompiledModel, _made_for, load_step
from tnnlm.inference.aot import _Step as StepOfParts
from tnnlm.inference.engine import open_engine, optimize_for_decoding, usable_device
from tnnlm.inference.linear import DTYPES, Int8Linear
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.inference.row_linear import FourByteRowLinear, RowLinear
from tnnlm.machine.capabilities import capability
from tnnlm.training.run import train

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.003, "int8": 0.05}
"""Absolute tolerance of logits around 1: order of sums in float32, else rounding of weights and inputs."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (3, 7), (2, 5, 7), (1, 40, 7), (1, 64), (2, 5, 64), (1, 40, 96)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_for_decoding_equal_the_plain_ones(bias: bool, shape: tuple[int, ...], dtype: str) -> None:
    plain = nn.Linear(shape[-1], 64, bias=bias)
    layer = choose_linear(torch.device("cpu"), dtype).make(plain.weight, plain.bias)
    x = torch.randn(*shape)
    y = layer(x)
    assert y.dtype == torch.float32
    limit = {"float32": 1e-5, "int8": 0.03}.get(dtype, 0.02)
    assert (y - plain(x)).norm() <= limit * plain(x).norm()


def test_int8_weights_are_symmetric_and_use_their_range() -> None:
    weight = torch.randn(16, 40)
    weight[3] = 0
    layer = Int8Linear(weight, None)
    assert layer.weight.abs().amax(1)[torch.arange(16) != 3].min() >= 126
    assert not layer.weight[3].any()
    back = layer.weight * layer.scale.float()[:, None]
    assert (back - weight).abs().max() <= 0.51 * layer.scale.float().max() * 1.02


@pytest.mark.parametrize("bias", [True, False])
def test_four_weights_in_a_word_are_the_same_int8_weights(bias: bool) -> None:
    plain = nn.Linear(28, 33, bias=bias)
    plain.weight.data[2] = 0
    plain.weight.data[3, :2] = torch.tensor([5.0, -5.0])  # both ends of the int8 range
    plain.weight.data[4] = -plain.weight.data[4].abs()
    x = torch.randn(1, 28)
    expected = RowLinear(plain.weight, plain.bias, "int8")(x)
    torch.testing.assert_close(FourByteRowLinear(plain.weight, plain.bias)(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_model_gives_the_logits_of_the_plain_one(method: str, dtype: str) -> None:
    plain, packed = converted(method), optimize_for_decoding(converted(method), dtype)
    tokens = torch.randint(300, (2, 30))
    expected, after = plain.prefill(tokens, plain.init_state(2))
    logits, state = packed.prefill(tokens, packed.init_state(2))
    scale = expected.std()
    assert (logits - expected).abs().max() <= TOLERANCE[dtype] * scale * 3
    for part, reference in zip(state.tensors, after.tensors, strict=True):
        assert part.dtype == reference.dtype == torch.float32
    one, _ = packed.step(tokens[:, 0], state)
    two, _ = plain.step(tokens[:, 0], after)
    assert (one - two).abs().max() <= TOLERANCE[dtype] * scale * 3


@pytest.mark.parametrize("method", METHODS)
def test_compiled_step_gives_the_logits_of_the_plain_one(method: str) -> None:
    if not capability("cpp_compiler"):
        pytest.skip("no C++ compiler")
    plain = converted(method)
    compile_converted("float32", method)
    engine, info = open_engine(whole(converted(method)), Path("out"))
    assert str(info) == "compiled engine, cpu, float32"
    state, expected_state = engine.model.init_state(1), plain.init_state(1)
    with torch.inference_mode():
        for token in torch.randint(300, (40, 1)):
            logits, state = engine.model.step(token, state)
            expected, expected_state = plain.step(token, expected_state)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    # Batches take another code path, which continues from the same state.
    both = state.select(torch.tensor([0, 0]))
    logits, _ = engine.model.step(torch.tensor([5, 5]), both)
    expected, _ = plain.step(torch.tensor([5]), expected_state)
    torch.testing.assert_close(logits, expected.expand(2, -1), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_steps_of_multirate_run_in_the_compiled_package() -> None:
    """The compilation itself is left to the other methods: the package is replaced by what it compiles."""
    plain = converted("multirate")
    calls: list[int] = []

    def package(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return StepOfParts(plain)(*inputs)

    model = CompiledModel(plain, package)
    state, expected_state = model.init_state(1), plain.init_state(1)
    for token in torch.randint(300, (40, 1)):
        logits, state = model.step(token, state)
        expected, expected_state = plain.step(token, expected_state)
        assert torch.equal(logits, expected)
    for part, reference in zip(state.tensors, expected_state.tensors, strict=True):
        assert torch.equal(part, reference)
    assert len(calls) == 40


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_compiled_step_rounds_the_weights_and_nothing_else(dtype: str) -> None:
    if not capability("cpp_compiler"):
        pytest.skip("no C++ compiler")
    compile_converted(dtype)
    engine, info = open_engine(whole(converted()), Path("out"), dtype=dtype)
    assert str(info) == f"compiled engine, cpu, {dtype}"
    assert_steps_round_the_weights_alone(engine, dtype)


def test_compiled_step_of_another_model_is_left_alone() -> None:
    Path("out").mkdir()
    Path("out/step-float32.pt2").write_bytes(b"native code of another model's step")
    Path("out/step-float32.json").write_text(json.dumps(_made_for("another")), encoding="utf-8")
    _, info = open_engine(whole(converted()), Path("out"))
    assert info.name == "packed"
    assert "the compiled step belongs to another model" in info.reason
    with pytest.raises(UserError, match="belongs to another model"):
        open_engine(whole(converted()), Path("out"), engine="compiled")


def test_compiled_step_of_another_machine_is_left_alone() -> None:
    Path("out").mkdir()
    model = converted()
    with pytest.raises(UserError, match=r"convert\.py --compile"):
        load_step(model, Path("out"), "float32", "abc")
    Path("out/step-float32.pt2").write_bytes(b"damaged")
    Path("out/step-float32.json").write_text(json.dumps({"torch": "1.0"}))
    with pytest.raises(UserError, match="another machine"):
        load_step(model, Path("out"), "float32", "abc")
    engine, info = open_engine(whole(model), Path("out"))
    assert info.name == "packed"
    assert "the compiled step is for another machine" in info.reason
    assert info.reason in str(info)
    assert engine.prefill(["the cat"]).logits.shape == (1, 300)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "fast"}, "--engine fast"),
        ({"dtype": "int4"}, "--dtype int4"),
        ({"engine": "eager", "dtype": "int8"}, "float32 only"),
        ({"engine": "compiled"}, "--engine compiled: no compiled step, .*; convert it with"),
        ({"engine": "graph"}, "--engine graph: needs a GPU; use another engine, or add --device cuda"),
    ],
)
def test_unavailable_engines_are_reported(options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_engine(whole(converted()), None, **options)


def test_scripts_run_every_engine_and_report_every_dtype(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_run("name=tiny", "trainer.max_steps=4"), None)
    compiler = capability("cpp_compiler").available
    monkeypatch.setattr("tnnlm.cli.convert.BY_DEFAULT", ("float32",))
    assert script("convert", "runs/tiny").code == 0
    report = json.loads(Path("runs/tiny/converted/conversion.json").read_text())
    assert {"bfloat16 weights", "int8 weights"} <= report["ppl"].keys()
    for dtype in ("bfloat16", "int8"):
        near = report["ppl"][f"{dtype} weights"]["32"] / report["ppl"]["recurrent"]["32"] - 1
        assert abs(near) < 0.005
    texts = {}
    for engine in ("auto", "packed", "eager"):
        words = ("--prompt", "The ", "--temperature", "0", "--max-new-tokens", "8", "--json")
        done = script("generate", *words, "--engine", engine)
        assert done.code == 0, done.err
        data = json.loads(done.out)
        texts[engine] = data["text"]
        assert data["engine"].startswith({"auto": "compiled" if compiler else "packed"}.get(engine, engine))
    assert len(set(texts.values())) == 1
    words = ("--prompt", "The ", "--max-new-tokens", "2", "--device", "cpu")
    assert COMPILER & modules_after("generate", words) == set(), "a compiled step runs without the compiler"
    assert script("generate", "--prompt", "The ", "--dtype", "int8", "--max-new-tokens", "4").code == 0
    refused = script("generate", "--prompt", "The ", "--dtype", "int4")
    assert refused.code == 2
    assert "int4" in refused.err


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_dtypes_without_a_good_operator_are_refused_on_a_gpu(dtype: str) -> None:
    with pytest.raises(UserError, match=rf"--dtype {dtype}: .* on cuda; use --dtype bfloat16"):
        choose_linear(torch.device("cuda:1"), dtype)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "is no name of a device"),
        ("", "is no name of a device"),
        ("cpu\n", "'cpu\\n': is no name of a device"),
        ("mps", "can't be used here (Could not run 'aten::empty"),
        ("meta", "can't be used here (Tensor.item() cannot be called on meta tensors)"),
        ("hpu", "can't be used here (No module named 'torch.hpu')"),
        ("opengl", "can't be used here ("),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no longer used as device type")
def test_devices_that_are_not_there_are_refused_in_a_short_line(name: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        usable_device(name)
    line = str(refused.value)
    assert line.startswith(f"--device {name}: {said}" if name.isprintable() else f"--device {said}")
    assert line.endswith("or cpu")
    assert line.isprintable()
    assert len(line) < 250


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_float64(*shape: int, dtype: torch.dtype, **_: Any) -> None:
        raise TypeError(f"Cannot convert a MPS Tensor to {dtype}")

    monkeypatch.setattr(torch, "zeros", no_float64)
    with pytest.raises(UserError, match=r"--device mps: can't be used here \(Cannot convert .*float64\)"):
        usable_device("mps")
