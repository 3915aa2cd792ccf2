"""Invariants 2 to 4, 6, 8 and 9 of CONTRIBUTING.md on whole models, for every kernel and recurrent form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.certificates import check_certificate
from tests.support.converted import measure_model, model_horizon
from tests.support.models import FAMILIES, run_steps, tiny_config
from tnnlm.checkpoints.converted import load_converted, save_converted
from tnnlm.conversion import convert_model
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.ops.recurrence import named_tensors
from tnnlm.tokenizer import train_bpe

LENGTH = 40
EXACT = {
    "tno": ("etsc", "window"),
    "fd_tno": ("etsc", "window"),
    "sgconv": ("etsc", "window", "multirate"),
    "rtf": ("etsc", "window", "companion"),
    "hyena": ("etsc", "window"),
}
"""Methods by family that are exact up to rounding on LENGTH lags."""
REDUCED = ("balanced", "auto", "gradient")
every_exact = pytest.mark.parametrize(
    ("family", "method"), [(family, method) for family, exact in EXACT.items() for method in exact]
)
every_form = pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family, exact in EXACT.items() for method in (*exact, *REDUCED)],
)


def trained(family: str, dtype: torch.dtype = torch.float64) -> CausalLM:
    """Return a tiny model whose kernels differ from their initialisation."""
    model = CausalLM(tiny_config(kernel=FAMILIES[family]()))
    with torch.no_grad():
        for kernel in kernels(model):
            for parameter in kernel.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def converted_by(model: CausalLM, method: str, horizon: int | str = LENGTH) -> CausalLM:
    if method in REDUCED:
        horizon = "auto"  # a reduced recurrence is exact only if the taps decay within the horizon
    options: dict[str, Any] = {"order": 6, "gradient_steps": 3} if method == "gradient" else {}
    if method == "balanced":
        options = {"poles": "channel", "tolerance": 0.05}
    return convert_model(model, method=method, horizon=horizon, **options)


def row_of(state: ModelState, row: int) -> ModelState:
    return state.select(torch.tensor([row]))


def assert_same_state(a: ModelState, b: ModelState) -> None:
    for x, y in zip(a.tensors, b.tensors, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_causal_and_rows_are_independent(family: str) -> None:
    model = trained(family)
    tokens = torch.randint(300, (2, LENGTH))
    changed = tokens.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 300
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[0, :25], before[0, :25], rtol=0, atol=1e-11)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-11)


@every_exact
def test_step_prefill_and_forward_agree(family: str, method: str) -> None:
    model = trained(family)
    converted = converted_by(model, method)
    tokens = torch.randint(300, (3, LENGTH))
    expected = model(tokens)
    prefilled, after_prefill = converted.prefill(tokens, converted.init_state(3))
    stepped, after_steps = run_steps(converted, tokens, converted.init_state(3))
    torch.testing.assert_close(prefilled, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(converted(tokens), expected, rtol=0, atol=1e-9)
    assert_same_state(after_prefill, after_steps)


@pytest.mark.parametrize("family", ["fd_tno", "sgconv", "rtf"])
def test_forms_of_a_finite_or_rational_kernel_agree_at_8_times_the_training_length(family: str) -> None:
    model = trained(family)
    method = {"fd_tno": "window", "sgconv": "multirate", "rtf": "companion"}[family]
    converted = converted_by(model, method, model_horizon(model))
    tokens = torch.randint(300, (1, 8 * 32))
    torch.testing.assert_close(converted(tokens), model(tokens), rtol=0, atol=1e-9)


@every_form
@pytest.mark.parametrize("chunk", [1, 2, 7, LENGTH])
def test_prefill_in_any_split_continues_from_a_nonzero_state(family: str, method: str, chunk: int) -> None:
    converted = converted_by(trained(family), method)
    tokens = torch.randint(300, (2, 2 * LENGTH))
    expected, last = run_steps(converted, tokens, converted.init_state(2))
    _, state = converted.prefill(tokens[:, :LENGTH], converted.init_state(2))
    outputs = []
    for part in tokens[:, LENGTH:].split(chunk, dim=1):
        logits, state = converted.prefill(part, state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected[:, LENGTH:], rtol=0, atol=1e-9)
    assert_same_state(state, last)


@every_form
def test_padded_batch_equals_single_prompts(family: str, method: str) -> None:
    converted = converted_by(trained(family), method)
    tokens, lengths = torch.randint(300, (3, 12)), torch.tensor([12, 5, 1])
    for warm in (False, True):
        state = converted.init_state(3)
        if warm:
            _, state = converted.prefill(torch.randint(300, (3, 9)), state)
        logits, after = converted.prefill(tokens, state, lengths)
        for row, length in enumerate(lengths.tolist()):
            single, last = converted.prefill(tokens[row : row + 1, :length], row_of(state, row))
            torch.testing.assert_close(logits[row : row + 1, :length], single, rtol=0, atol=1e-9)
            assert_same_state(row_of(after, row), last)


@every_form
def test_inactive_rows_keep_their_state(family: str, method: str) -> None:
    converted = converted_by(trained(family), method)
    _, state = converted.prefill(torch.randint(300, (2, 9)), converted.init_state(2))
    _, after = converted.step(torch.randint(300, (2,)), state, torch.tensor([False, True]))
    for old, new in zip(state.layers, after.layers, strict=True):
        pairs = [*zip(named_tensors(old).values(), named_tensors(new).values(), strict=True)]
        assert all(torch.equal(a[0], b[0]) for a, b in pairs)
        assert any(not torch.equal(a[1], b[1]) for a, b in pairs)


# A finite, rough kernel of 32 lags has no small recurrence: at small tolerances, poles cancel in float32.
@pytest.mark.parametrize(
    ("family", "tolerance"),
    [
        *((family, tolerance) for family in ("tno", "fd_tno", "rtf") for tolerance in (1e-2, 1e-3)),
        ("sgconv", 0.3),
        ("sgconv", 0.05),
    ],
)
def test_balanced_meets_its_tolerance_on_the_horizon_and_at_8_times_the_training_length(
    family: str, tolerance: float
) -> None:
    model = trained(family, torch.float32)
    horizon = model_horizon(model)
    converted = convert_model(model, method="balanced", tolerance=tolerance, poles="channel")
    for kernel, params in zip(kernels(model), recurrences(converted), strict=True):
        for length in (horizon, 8 * 32):
            with torch.no_grad():
                k = kernel(length).double()
            assert (params.taps(length) - k).norm() <= 1.02 * tolerance * k.norm()
        assert params.largest_pole() < 1


@every_form
def test_certificate_bounds_errors_and_poles_of_every_layer(family: str, method: str) -> None:
    model = trained(family, torch.float32)
    converted = converted_by(model, method)
    report = measure_model(model, converted, method=method, horizon=LENGTH)
    length = 8 * LENGTH
    for kernel, params, layer in zip(kernels(model), recurrences(converted), report.layers, strict=True):
        with torch.no_grad():
            check_certificate(layer, params, kernel(length), LENGTH, length)


@every_form
def test_converted_model_is_the_same_after_saving_and_under_casts(
    family: str, method: str, tmp_path: Path
) -> None:
    model = trained(family, torch.float32)
    converted = converted_by(model, method)
    tokens = torch.randint(300, (2, 20))
    expected = converted(tokens)
    tokenizer = train_bpe(["some text of a test " * 9], 300, "<eos>", 1, False)
    report = measure_model(model, converted, method=method, horizon=LENGTH)
    assert report.layers[0].order == recurrences(converted)[0].order()
    save_converted(tmp_path / "converted", converted, tokenizer, report)
    loaded = load_converted(tmp_path / "converted").model
    assert torch.equal(loaded(tokens), expected)
    assert loaded.config.kernel.name == family
    before = {name: buffer.clone() for name, buffer in converted.named_buffers()}
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        converted.to(cast)
        for name, buffer in converted.named_buffers():
            assert torch.equal(buffer, before[name]), name
            assert buffer.dtype == before[name].dtype
    assert all(part.dtype == torch.float32 for part in converted.init_state(1).tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_parameters_are_not_cast_and_get_gradients(family: str) -> None:
    model = trained(family, torch.float32)
    taps = [kernel(32).detach() for kernel in kernels(model)]
    model.to(torch.bfloat16)
    for kernel, before in zip(kernels(model), taps, strict=True):
        assert torch.equal(kernel(32), before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kernel(32), before)
    model.float()(torch.randint(300, (2, 20))).square().mean().backward()
    for kernel in kernels(model):
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in kernel.parameters())
