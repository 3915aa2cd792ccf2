"""Blocks of every wiring: causality, agreement of forward, prefill and step, padding, and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.converted import measure_model
from tests.support.models import FAMILIES, run_steps, tiny_config
from tnnlm.checkpoints.converted import load_converted, save_converted
from tnnlm.config.loader import load_config
from tnnlm.conversion import convert_model
from tnnlm.errors import ConfigError
from tnnlm.models.causal_lm import CausalLM, ModelState, state_bytes
from tnnlm.models.encoders import MaskedLM
from tnnlm.tokenizer import train_bpe

WIRINGS = ("hyena", "s4", "s4_glu")
LENGTH = 21
every_wiring = pytest.mark.parametrize("wiring", WIRINGS)


def model_of(wiring: str, family: str = "hyena") -> CausalLM:
    """Return a model in float64 whose norms differ from their initialisation."""
    sizes = {"d_model": 12, "expand": 1, "final_norm": "layer"}
    model = CausalLM(tiny_config(block=wiring, kernel=FAMILIES[family](), **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


@every_wiring
def test_forward_is_causal_and_every_parameter_is_trained(wiring: str) -> None:
    model = model_of(wiring)
    tokens = torch.randint(300, (2, LENGTH))
    changed = tokens.clone()
    changed[0, 13:] = (changed[0, 13:] + 1) % 300
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[0, :13], before[0, :13], rtol=0, atol=1e-11)
    assert (after[0, 13:] - before[0, 13:]).abs().min(1).values.max() > 1e-6
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-11)
    model.loss(torch.randint(300, (2, LENGTH + 1))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@every_wiring
@pytest.mark.parametrize("family", ["hyena", "rtf"])
def test_step_prefill_and_forward_agree(wiring: str, family: str) -> None:
    model = model_of(wiring, family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "denominator" in name:
                parameter.mul_(0.3)  # stable poles
    converted = convert_model(model, method="companion" if family == "rtf" else "window", horizon=LENGTH)
    tokens = torch.randint(300, (2, LENGTH))
    expected = model(tokens)
    stepped, last = run_steps(converted, tokens, converted.init_state(2))
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-9)
    for split in (1, 2, 8):
        first, state = converted.prefill(tokens[:, :split], converted.init_state(2))
        second, state = converted.prefill(tokens[:, split:], state)
        torch.testing.assert_close(torch.cat((first, second), dim=1), expected, rtol=0, atol=1e-9)
        for a, b in zip(state.tensors, last.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@every_wiring
def test_padded_and_inactive_rows_keep_their_state(wiring: str) -> None:
    converted = convert_model(model_of(wiring), method="window", horizon=LENGTH)
    tokens = torch.randint(300, (2, 9))
    _, batch = converted.prefill(tokens, converted.init_state(2), torch.tensor([9, 4]))
    _, single = converted.prefill(tokens[1:, :4], converted.init_state(1))
    expected, _ = converted.step(tokens[1:, 0], single)
    found, after = converted.step(tokens[:, 0], batch, torch.tensor([True, False]))
    torch.testing.assert_close(found[1:], expected, rtol=0, atol=1e-9)
    again, _ = converted.step(tokens[:, 0], ModelState.join([after.select(torch.tensor([1]))] * 2))
    torch.testing.assert_close(again[1:], expected, rtol=0, atol=1e-9)


@every_wiring
def test_saved_model_has_the_same_logits(wiring: str) -> None:
    model = model_of(wiring).float()
    tokenizer = train_bpe(["some words"], 290, "<|endoftext|>", 1, False)
    converted = convert_model(model, method="window", horizon=LENGTH)
    report = measure_model(model, converted, method="window", horizon=LENGTH)
    save_converted(Path("converted"), converted, tokenizer, report)
    assert report.state_bytes == state_bytes(converted.init_state(1))
    loaded = load_converted(Path("converted")).model
    tokens = torch.randint(290, (2, 7))
    expected, _ = converted.prefill(tokens, converted.init_state(2))
    found, _ = loaded.prefill(tokens, loaded.init_state(2))
    assert torch.equal(found, expected)


@every_wiring
def test_padding_of_a_bidirectional_model_has_no_effect(wiring: str) -> None:
    model = MaskedLM(tiny_config(block=wiring, expand=1, kernel=FAMILIES["tno"]())).double().eval()
    tokens = torch.randint(300, (1, 12))
    mask = torch.arange(12)[None] < 8
    whole = model(tokens, mask=mask)
    torch.testing.assert_close(whole[:, :8], model(tokens[:, :8]), rtol=0, atol=1e-11)


def test_expansion_of_other_wirings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.expand=3: must be 1 with model\.block=hyena"):
        load_config(None, ["model.block=hyena"])
