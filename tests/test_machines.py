"""Every dtype, engine and conversion on simulated machines that lack instructions, operators or tools."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.models import FAMILIES, tiny_config
from tests.support.simulated import MACHINES
from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.converted import load_converted
from tnnlm.conversion import convert_model
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.inference.linear import DTYPES, HalfLinear, narrowed
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.machine.capabilities import capability
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.estimate import resolve_precision

CPU = torch.device("cpu")
on_every_machine = pytest.mark.parametrize("machine", MACHINES, indirect=True)
LAST_RESORT = dict.fromkeys(DTYPES, "widened in tiles") | {"float32": "plain"}
METHODS = {"balanced": "tno", "etsc": "tno", "window": "sgconv", "companion": "rtf", "multirate": "sgconv"}


def rounded(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    values, scale = narrowed(weight, dtype)
    return values.double() if scale is None else values.double() * scale.double()[:, None]


@on_every_machine
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 40), (1, 64), (2, 5, 64), (1, 40, 96), (2, 700)])
def test_linear_layer_equals_the_product_with_rounded_weights(
    machine: str, dtype: str, shape: tuple[int, ...]
) -> None:
    plain = nn.Linear(shape[-1], 96).requires_grad_(False)
    choice = choose_linear(CPU, dtype)
    layer = choice.make(plain.weight, plain.bias)
    x = torch.randn(*shape)
    expected = x.double() @ rounded(plain.weight, dtype).T + plain.bias.double()
    # oneDNN bfloat16 and the int8 operator round x and y to bfloat16, FBGEMM with int8 weights rounds x to
    # integers; the others round neither.
    exact = choice.name in ("plain", "FBGEMM float16", "widened in tiles") or dtype == "float32"
    limit = 1e-5 if exact else 3e-2 if choice.name == "FBGEMM int8" else 1e-2
    y = layer(x)
    assert y.dtype == torch.float32
    assert y.shape == expected.shape
    assert (y - expected).norm() <= limit * expected.norm()


@on_every_machine
@pytest.mark.parametrize("dtype", DTYPES)
def test_choice_avoids_what_is_missing_and_says_why(machine: str, dtype: str) -> None:
    choice = choose_linear(CPU, dtype)
    gone = {
        "no-avx512": ("bfloat16", "oneDNN"),
        "no-onednn": (dtype, "oneDNN"),
        "onednn-switched-off": (dtype, "oneDNN"),
        "no-fbgemm": (dtype, "FBGEMM float16"),
        "no-int8": ("int8", "int8"),
        "macos": (dtype, "oneDNN"),
    }.get(machine)
    if gone is not None and gone[0] == dtype:
        assert choice.name != gone[1]
    if machine in ("no-avx512", "no-onednn", "onednn-switched-off") and dtype == "bfloat16":
        assert "no onednn_bfloat16: " in choice.reason
    if machine == "no-fbgemm" and dtype == "int8":
        assert choice.name == "int8"
        assert "no fbgemm_int8: Could not run 'quantized::linear_prepack'" in choice.reason
    if (machine == "macos" and dtype != "int8") or (machine == "no-int8" and dtype == "int8"):
        assert choice.name == LAST_RESORT[dtype]
    assert (choice.reason == "") == capability_of_first(dtype)


def capability_of_first(dtype: str) -> bool:
    first = {
        "float32": "onednn_float32",
        "bfloat16": "onednn_bfloat16",
        "float16": "fbgemm_float16",
        "int8": "fbgemm_int8",
    }
    return capability(first[dtype]).available


@on_every_machine
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_has_the_same_bits_in_any_batch_where_that_is_promised(machine: str, dtype: str) -> None:
    choice = choose_linear(CPU, dtype)
    if not choice.batch_invariant:
        pytest.skip(f"{choice.name} promises nothing")
    for n_in, n_out in ((32, 64), (96, 300), (512, 200)):
        layer = choice.make(torch.randn(n_out, n_in), torch.randn(n_out))
        x = torch.randn(140, n_in)
        whole = layer(x)
        for n in (*range(2, 20), 31, 32, 64, 121, 122):
            assert torch.equal(layer(x[3 : 3 + n]), whole[3 : 3 + n]), f"{n} rows of {n_in} -> {n_out}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e6, 1e30])
def test_half_precision_layers_hold_weights_of_any_size(size: float, dtype: str) -> None:
    if not capability("fbgemm_float16"):
        pytest.skip("no FBGEMM")
    weight, bias, x = torch.randn(40, 24) * size, torch.randn(40) * size, torch.randn(5, 24)
    expected = x.double() @ rounded(weight, dtype).T + bias.double()
    error = (HalfLinear(weight, bias, dtype)(x) - expected).norm() / expected.norm()
    assert error <= 1e-6
    assert not HalfLinear(torch.zeros(3, 24), None, dtype)(x).any()
    assert (rounded(weight, "float16") - weight.double()).abs().max() <= 2**-11 * weight.abs().max()


def test_half_precision_layers_hold_weights_of_very_different_sizes() -> None:
    if not capability("fbgemm_float16"):
        pytest.skip("no FBGEMM")
    weight, x = torch.randn(40, 24) * 0.1, torch.randn(5, 24)
    # Each row has one large weight, whose input is zero, next to small ones.
    weight[:, 0], x[:, 0] = 6e5, 0
    weight[7] *= 1e-7  # an output with tiny weights
    weight[8] = 1e-40
    expected = x.double() @ weight.bfloat16().double().T
    error = (HalfLinear(weight, None, "bfloat16")(x) - expected).abs().amax(0)
    assert (error <= 1e-6 * expected.abs().amax(0) + 1e-37).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_that_is_not_finite_never_becomes_a_number(bad: float, dtype: str) -> None:
    weight = torch.randn(32, 32)
    weight[3, 5] = bad
    y = choose_linear(CPU, dtype).make(weight, torch.randn(32))(torch.randn(4, 32))
    assert not y[:, 3].isfinite().any()
    assert y[:, torch.arange(32) != 3].isfinite().all()


@on_every_machine
@pytest.mark.parametrize(("method", "dtype"), [*((m, "float32") for m in METHODS), ("balanced", "bfloat16")])
def test_conversions_decode_as_the_plain_modules(machine: str, method: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = CausalLM(tiny_config(kernel=FAMILIES[METHODS[method]](), d_model=32)).eval()
    plain, packed = (convert_model(model, method=method) for _ in range(2))
    optimize_for_decoding(packed, dtype)
    tokens = torch.randint(300, (3, 40))
    expected, after = plain.prefill(tokens[:, :-1], plain.init_state(3))
    logits, state = packed.prefill(tokens[:, :-1], packed.init_state(3))
    limit = (1e-4 if dtype == "float32" else 0.1) * expected.std()
    assert (logits - expected).abs().max() <= limit
    step, _ = packed.step(tokens[:, -1], state)
    assert (step - plain.step(tokens[:, -1], after)[0]).abs().max() <= limit


@on_every_machine
def test_precision_auto_is_bfloat16_only_where_that_is_fast(machine: str) -> None:
    precision = resolve_precision(tiny_run())
    if machine in ("no-avx512", "macos"):
        assert precision == "32-true"
    assert (precision == "bf16-mixed") == capability("bfloat16_arithmetic").available


@on_every_machine
def test_scripts_work_and_report_what_ran(machine: str, run_here: Path, script: Any) -> None:
    done = script("convert", "runs/tiny", "--verify")
    assert done.code == 0, done.out + done.err
    report = json.loads((run_here / "converted/conversion.json").read_text())
    assert {"parallel", "recurrent", "bfloat16 weights", "int8 weights"} <= report["ppl"].keys()
    assert report["not_measured"] == {}
    for dtype in DTYPES:
        words = ("--prompt", "The ", "--dtype", dtype, "--max-new-tokens", "4", "--json")
        written = script("generate", *words)
        assert written.code == 0, written.err
        info = json.loads(written.out)["engine_info"]
        assert (info["name"], info["dtype"]) == ("packed", dtype)
        assert info["linear"] == choose_linear(CPU, dtype).name
        assert choose_linear(CPU, dtype).reason in info["reason"]
        assert info["threads"] == torch.get_num_threads()
    shown = script("generate", "--prompt", "The ", "--dtype", "bfloat16", "--max-new-tokens", "2")
    assert f"packed engine, cpu, bfloat16 by {choose_linear(CPU, 'bfloat16').name}" in shown.err


@pytest.mark.parametrize("machine", ["no-compiler"], indirect=True)
def test_compiling_is_refused_before_any_work_where_there_is_no_compiler(
    machine: str, run_here: Path, script: Any
) -> None:
    refused = script("convert", "runs/tiny", "--compile")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "no-such-compiler" in refused.err
    assert not (run_here / "converted").exists()
    assert script("convert", "runs/tiny").code == 0
    assert script("convert", "runs/tiny/converted", "--compile").code == 2
    assert load_converted(run_here / "converted")


def test_wrong_switch_is_refused_before_any_work(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TNNLM_WITHOUT", "bogus")
    refused = script("convert", "runs/tiny")
    assert refused.code == 2
    assert "unknown capability bogus" in refused.err
    assert not (run_here / "converted").exists()


BOOM = "RuntimeError: boom"
OPTIONAL = {
    "perplexity of a dtype": ("variants.optimize_for_decoding", (), 0, f"not measured here: {BOOM}"),
    "every perplexity": ("pipeline.open_corpus", (), 0, f"no perplexities: {BOOM}"),
    "parallel perplexity": ("variants.parallel_losses", (), 0, f"no perplexities: {BOOM}"),
    "a form while it is scored": ("variants.recurrent_losses", (), 0, f"not measured here: {BOOM}"),
    "verify": ("pipeline.check_layers", ("--verify",), 1, f"FAILED: verify: {BOOM}"),
    "model card": ("description.model_card", (), 1, f"FAILED: model card: {BOOM}"),
    "compile": ("packages.compile_step", ("--compile",), 1, f"FAILED: --compile float32: {BOOM}"),
    "export": ("packages.export_torch", ("--export",), 1, f"FAILED: --export: {BOOM}"),
}
"""Steps that fail: the function that raises, options of convert.py, its exit code, and its output."""


@pytest.mark.parametrize("step", OPTIONAL)
def test_no_optional_step_loses_the_conversion(
    step: str, run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, options, code, said = OPTIONAL[step]
    if "--compile" in options and not capability("cpp_compiler"):
        pytest.skip("no C++ compiler")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom\nand a second line")

    monkeypatch.setattr(f"tnnlm.deployment.{place}", fail)
    done = script("convert", "runs/tiny", *options)
    assert done.code == code, done.err
    assert said in done.out
    assert "second line" not in done.out + done.err
    assert load_converted(run_here / "converted")
    assert (run_here / "converted/README.md").is_file() == (step != "model card")
    assert script("generate", "--prompt", "The ", "--max-new-tokens", "2").code == 0


def test_interrupted_measurement_leaves_the_converted_model(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tnnlm.deployment.variants.parallel_losses", interrupt)
        stopped = script("convert", "runs/tiny")
    assert stopped.code == 130
    assert "interrupted: runs/tiny/converted holds the converted model" in stopped.err
    assert load_converted(run_here / "converted")
    assert script("convert", "runs/tiny", "--force").code == 0
