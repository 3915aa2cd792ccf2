"""Memory of a conversion: weights are held once, and layers and variants are processed one at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from experiments.timing import peak_allocated
from tests.support.models import FAMILIES, tiny_config
from tests.support.scripts import assert_refused
from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion import convert_layers, measure
from tnnlm.deployment import perplexity, variants
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels, shared_copy


def storages(model: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_peak_of_a_conversion_grows_by_the_recurrences_alone() -> None:
    peaks, weights, recurrences = [], [], []
    for n_layers in (2, 12):
        torch.manual_seed(0)
        model = CausalLM(tiny_config(n_layers=n_layers, glu_dim=4096)).eval()
        for kernel in kernels(model)[1:]:  # equal layers, of which none is the largest
            kernel.load_state_dict(kernels(model)[0].state_dict())

        def converted(model: CausalLM = model) -> Any:
            recipe = ConversionConfig(method="balanced")
            horizon, layers = convert_layers(model, recipe)
            made = attach(model, [layer.params for layer in layers], shared=True)
            return made, measure(model, layers, method="balanced", horizon=horizon, seconds=0.0)

        made, _ = converted()
        recurrences.append(sum(b.numel() * b.element_size() for b in made.buffers()))
        weights.append(sum(p.numel() * p.element_size() for p in model.parameters()))
        del made
        peaks.append(peak_allocated(converted))
    grown = peaks[1] - peaks[0]
    assert grown <= 2 * (recurrences[1] - recurrences[0])
    assert grown < 0.05 * (weights[1] - weights[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_copy_has_the_same_outputs_and_storage(family: str) -> None:
    model = CausalLM(tiny_config(kernel=FAMILIES[family]())).double().eval()
    made = shared_copy(model)
    tokens = torch.randint(300, (2, 19))
    assert torch.equal(made(tokens), model(tokens))
    assert storages(made) == storages(model)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert all(mine is not theirs for mine, theirs in zip(made.modules(), model.modules(), strict=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    made.to(torch.float32)
    made.embedding.weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert any(trained)


def test_perplexities_hold_one_variant_at_a_time_and_share_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(tiny_config()).eval()
    recipe = ConversionConfig(method="balanced")
    converted = attach(model, [layer.params for layer in convert_layers(model, recipe)[1]], shared=True)
    rows = torch.randint(300, (2, 300))
    corpus: Any = SimpleNamespace(
        rows=lambda split, length, limit: rows[:, : length + 1], report=SimpleNamespace(protocol="documents")
    )
    earlier: list[weakref.ref[nn.Module]] = []
    scored, original = [], variants.recurrent_losses

    def watched(variant: CausalLM, tokens: torch.Tensor, chunk: int) -> Any:
        gc.collect()
        alive = [ref() for ref in earlier if ref() is not None and ref() is not converted]
        assert all(one is variant for one in alive)
        if all(ref() is not variant for ref in earlier):
            earlier.append(weakref.ref(variant))
        scored.append(variant.embedding.weight.data_ptr())
        return original(variant, tokens, chunk)

    monkeypatch.setattr(variants, "recurrent_losses", watched)
    found = perplexity.measure_perplexities(model, converted, corpus, Config(model=model.config))
    assert found.not_measured == {}
    assert list(found.ppl) == [
        "parallel",
        "recurrent",
        "bfloat16 weights",
        "int8 weights",
        "etsc 32",
        "window 32",
    ]
    assert len(earlier) == 5
    assert set(scored) == {model.embedding.weight.data_ptr()}
    assert found.ppl["recurrent"]["32"] == pytest.approx(found.ppl["parallel"]["32"], rel=1e-4)


def test_a_device_that_is_not_there_is_refused(run_here: Path, script: Any) -> None:
    assert_refused(script("convert", "runs/tiny", "--device", "gpu9"), "--device gpu9")
    assert_refused(script("convert", "runs/tiny", "--device", "meta"), "--device meta")
    assert not Path("runs/tiny/converted").exists()
