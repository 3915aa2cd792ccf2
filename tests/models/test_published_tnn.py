"""The TNN layers and its language model equal the authors' own, in outputs and gradients (float64)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import run_steps, tiny_config
from tests.support.reference import reference
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import convert_model
from tnnlm.kernels import TNOConfig, TNOKernel, TwoSidedKernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM
from tnnlm.modules import BiConv, LongConv

TIGHT = {"rtol": 0, "atol": 1e-11}
RPE = {"pos_proj": "input", "out.2": "output", "layers.0.2": "hidden.0", "layers.1.2": "hidden.1"}
"""Layers of the position encoder: the authors' name -> ours."""


def kernel_weights(theirs: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the authors' tensors below ``prefix`` under the names of a TNOKernel."""
    ours = {
        f"rpe.{mine}.{kind}": theirs[f"{prefix}rpe.{name}.{kind}"]
        for name, mine in RPE.items()
        for kind in ("weight", "bias")
    }
    gamma = theirs.get(f"{prefix}gamma")
    return ours if gamma is None else {**ours, "decays": gamma.flatten()}


def block_weights(theirs: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the authors' tensors below ``prefix`` under the names of a Block."""
    mixer, glu = f"{prefix}token_mixer", f"{prefix}feature_mixer"
    ours = {
        f"mixer.conv.kernel.{name}": value for name, value in kernel_weights(theirs, f"{mixer}.toep.").items()
    }
    for kind in ("weight", "bias"):
        ours |= {
            f"mixer.in_proj.{kind}": torch.cat([theirs[f"{mixer}.{part}.{kind}"] for part in _GATED]),
            f"mixer.out_proj.{kind}": theirs[f"{mixer}.o.{kind}"],
            f"glu.in_proj.{kind}": torch.cat([theirs[f"{glu}.{part}.{kind}"] for part in ("l1", "l2")]),
            f"glu.out_proj.{kind}": theirs[f"{glu}.l3.{kind}"],
        }
    return ours


_GATED = ("u_proj", "v_proj")


def group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``name.``, without it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def published_lm(**settings: object) -> tuple[CausalLM, dict[str, Tensor]]:
    """Return our model with the authors' weights, and the reference case."""
    tensors, _ = reference("tnn_lm_fairseq_wiring")
    kernel = TNOConfig(rpe_dim=6, rpe_layers=2)
    sizes = {"d_model": 8, "n_layers": 2, "vocab_size": 31, "max_length": 21, "kernel": kernel}
    wiring = {"final_norm": "layer", "embed_scale": True, **settings}
    model = CausalLM(ModelConfig(**sizes, **wiring)).double().eval()
    weights = {"embedding.weight": tensors["embed_tokens.weight"]}
    for index in range(2):
        own = block_weights(tensors, f"layers.{index}.")
        weights |= {f"blocks.{index}.{name}": value for name, value in own.items()}
    if wiring["final_norm"] == "layer":
        weights |= {f"norm.{kind}": tensors[f"layer_norm.{kind}"] for kind in ("weight", "bias")}
    model.load_state_dict(weights)
    return model, tensors


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_toeplitz_operator_is_the_published_one(direction: str) -> None:
    tensors, metadata = reference(f"tno_{direction}")
    config = TNOConfig(decay=float(metadata["gamma"]), rpe_dim=8, rpe_layers=2)
    kernel: TNOKernel | TwoSidedKernel = TNOKernel(config, 6)
    conv: LongConv | BiConv = LongConv(kernel)
    if direction == "bidirectional":
        kernel = TwoSidedKernel(config, 6, 19)
        conv = BiConv(kernel)
    conv.double()
    single = kernel if isinstance(kernel, TNOKernel) else kernel.kernel
    single.load_state_dict(kernel_weights(group(tensors, "weights")))
    x = tensors["x"].clone().requires_grad_()
    y = conv(x)
    torch.testing.assert_close(y, tensors["y"], **TIGHT)
    y.backward(tensors["grad_y"])
    torch.testing.assert_close(x.grad, tensors["grad_x"], **TIGHT)
    assert_gradients(single, kernel_weights(group(tensors, "grad")))


def test_layer_is_the_published_one() -> None:
    tensors, metadata = reference("tnn_layer_causal")
    kernel = TNOConfig(decay=float(metadata["gamma"]), rpe_dim=6, rpe_layers=2)
    sizes = {"d_model": 8, "glu_dim": int(metadata["glu_dim"]), "n_layers": 1, "kernel": kernel}
    block = CausalLM(tiny_config(**sizes)).double().layers[0]
    block.load_state_dict(block_weights(group(tensors, "weights")))
    x = tensors["x"].clone().requires_grad_()
    torch.testing.assert_close(block.norm(x), tensors["y_norm"], **TIGHT)
    torch.testing.assert_close(block.mixer(x), tensors["y_gtu"], **TIGHT)
    torch.testing.assert_close(block.glu(x), tensors["y_glu"], **TIGHT)
    y = block(x)
    torch.testing.assert_close(y, tensors["y"], **TIGHT)
    y.backward(tensors["grad_y"])
    torch.testing.assert_close(x.grad, tensors["grad_x"], **TIGHT)
    assert_gradients(block, block_weights(group(tensors, "grad")))


def assert_gradients(module: nn.Module, expected: Mapping[str, Tensor]) -> None:
    found = {name: p.grad for name, p in module.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **TIGHT)


def test_language_model_is_wired_as_the_published_one() -> None:
    model, tensors = published_lm()
    tokens = tensors["tokens"].long()
    torch.testing.assert_close(model(tokens), tensors["logits"], **TIGHT)


@pytest.mark.parametrize("wiring", [{"final_norm": "simple_rms"}, {"embed_scale": False}])
def test_neither_setting_of_the_wiring_is_without_effect(wiring: dict[str, object]) -> None:
    model, tensors = published_lm(**wiring)
    assert (model(tensors["tokens"].long()) - tensors["logits"]).abs().max() > 0.01


def test_recurrent_form_is_wired_as_the_published_one() -> None:
    model, tensors = published_lm()
    tokens = tensors["tokens"].long()
    converted = convert_model(model, method="window", horizon=21)
    with torch.no_grad():
        stepped, _ = run_steps(converted, tokens, converted.init_state(2))
        prefilled, _ = converted.prefill(tokens, converted.init_state(2))
    for logits in (stepped, prefilled):
        torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)


def test_encoders_scale_and_norm_as_the_language_model_does() -> None:
    torch.manual_seed(0)
    config = tiny_config(final_norm="layer", embed_scale=True)
    model = MaskedLM(config).double()
    x = model.embedding.weight[torch.arange(5)[None]] * config.d_model**0.5
    for block in model.layers:
        x = block(x)
    expected = nn.functional.layer_norm(x, (config.d_model,)) @ model.embedding.weight.T
    torch.testing.assert_close(model(torch.arange(5)[None]), expected, **TIGHT)
