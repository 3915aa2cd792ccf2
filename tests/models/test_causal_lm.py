"""The causal language model: published sizes, all configurations build, and gradients."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_config
from tests.support.scripts import ROOT
from tnnlm.config.loader import load_config
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.factory import build_model
from tnnlm.modules import SimpleRMSNorm

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_builds(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config)
    assert model.n_params > 0
    assert config.name == path.stem


def test_published_model_has_the_published_parameters() -> None:
    config = load_config(ROOT / "configs" / "tnn_wt103.yaml")
    with torch.device("meta"):
        model = CausalLM(config.model)
    # The paper's count and the final LayerNorm's scale and bias.
    assert model.n_params == 48_665_600 + 2 * 512
    decays = [b for module in model.modules() if isinstance(module, Kernel) for b in module.buffers()]
    assert model.n_params + sum(b.numel() for b in decays) == 48_676_352 + 2 * 512


def test_head_is_tied_to_the_embedding() -> None:
    model = CausalLM(tiny_config())
    assert not any("head" in name for name, _ in model.named_parameters())
    model.embedding.weight.data.zero_()
    assert not model(torch.zeros(1, 3, dtype=torch.long)).any()


def test_gradients_reach_every_parameter() -> None:
    model = CausalLM(tiny_config())
    model(torch.randint(300, (2, 20))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_simple_rms_norm_is_the_published_one() -> None:
    x = torch.randn(3, 10, dtype=torch.float64)
    expected = x / (x.norm(dim=-1, keepdim=True) / 10**0.5 + 1e-8)
    torch.testing.assert_close(SimpleRMSNorm()(x), expected)
    assert torch.isfinite(SimpleRMSNorm()(torch.zeros(1, 4))).all()


def test_rows_of_a_batch_are_independent() -> None:
    model = CausalLM(tiny_config()).double().eval()
    tokens = torch.randint(300, (3, 20))
    single = model(tokens[1:2])
    torch.testing.assert_close(model(tokens)[1:2], single, rtol=0, atol=1e-12)


# The compiler of torch uses functions that torch itself deprecates.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_activations_give_the_same_loss_and_gradients(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr("tnnlm.ops.cross_entropy._MOST_ON_CPU", 7 * 300)
    torch.manual_seed(0)
    model = CausalLM(tiny_config()).train()
    rows = torch.randint(300, (2, 12))
    expected = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(model.loss(rows), expected)
    model.recompute = True
    names = [name for name, _ in model.named_parameters()]
    if compiled:
        model.compile_blocks()
    loss = model.loss(rows)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert [name for name, _ in model.named_parameters()] == names
