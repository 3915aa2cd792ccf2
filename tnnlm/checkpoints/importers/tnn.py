"""Key map of Toeplitz neural networks (arXiv 2305.04749), as fairseq and tnn-pytorch name their weights.

The language models of the authors multiply the embedding by sqrt(d_model) and end in a LayerNorm; a stack of
layers without ``layer_norm`` has neither.
"""

from __future__ import annotations

import re

from torch import Tensor

from tnnlm.checkpoints.importers.keys import Keys, Plan, Rule
from tnnlm.errors import CheckpointError

MARK = r"layers\.\d+\.token_mixer\.toep\."
"""Key that only this format has, after a prefix."""


def plan(keys: Keys) -> Plan:
    """Return the settings and the key map of a checkpoint.

    Raises:
        CheckpointError: If a key that determines a size is missing, or a decay is not above 0 and at most 1.
    """
    prefix = keys.prefix(r"layers\.\d+\.token_mixer\.")
    embedding = f"{prefix}embed_tokens.weight"
    vocab_size, d_model = keys.shape(embedding, 2)
    first = f"{prefix}layers.0"
    rpe_dim, _ = keys.shape(f"{first}.token_mixer.toep.rpe.pos_proj.weight", 2)
    channels, _ = keys.shape(f"{first}.token_mixer.u_proj.weight", 2)
    glu_dim, _ = keys.shape(f"{first}.feature_mixer.l1.weight", 2)
    n_layers = keys.count(rf"{re.escape(prefix)}layers\.(\d+)\.")
    rpe_layers = keys.count(rf"{re.escape(prefix)}layers\.\d+\.token_mixer\.toep\.rpe\.layers\.(\d+)\.")
    for key, tensor in keys.weights.items():
        values = tensor.float()  # types of 8 bits have no comparisons
        if key.endswith(".toep.gamma") and not bool(((values > 0) & (values <= 1)).all() and values.numel()):
            raise CheckpointError(f"{keys.path}: {key} has decays that are not above 0 and at most 1")
    gamma = keys.weights.get(f"{first}.token_mixer.toep.gamma")
    published = f"{prefix}layer_norm.weight" in keys.weights or prefix == "decoder."
    made = Plan(
        {
            "model.d_model": d_model,
            "model.vocab_size": vocab_size,
            "model.n_layers": n_layers,
            "model.expand": max(1, channels // d_model),
            "model.glu_dim": glu_dim,
            "model.final_norm": "layer" if published else "simple_rms",
            "model.embed_scale": published,
            "model.kernel.name": "tno",
            "model.kernel.rpe_dim": rpe_dim,
            "model.kernel.rpe_layers": rpe_layers,
            "model.kernel.decay": 1.0 if gamma is None else float(gamma.flatten()[0]),
        },
        {"embedding.weight": Rule((embedding,))},
        {f"{prefix}output_projection.weight": embedding},
        (r".*\.version", r".*embed_positions\._float_tensor", r".*_norm\.scale"),
        ("model.embed_scale",),
    )
    if published:
        for part in ("weight", "bias"):
            made.rules[f"norm.{part}"] = Rule((f"{prefix}layer_norm.{part}",))
    for index in range(n_layers):
        _add_layer(made, f"blocks.{index}", f"{prefix}layers.{index}", rpe_layers, channels, gamma)
    return made


def _add_layer(
    made: Plan, own: str, theirs: str, rpe_layers: int, channels: int, gamma: Tensor | None
) -> None:
    """Add the rules of one layer; without a ``gamma`` its kernels don't decay."""
    mixer, toep = f"{theirs}.token_mixer", f"{theirs}.token_mixer.toep"
    kernel = f"{own}.mixer.conv.kernel"
    made.linear(f"{own}.mixer.in_proj", f"{mixer}.u_proj", f"{mixer}.v_proj")
    made.linear(f"{own}.mixer.out_proj", f"{mixer}.o")
    made.linear(f"{own}.glu.in_proj", f"{theirs}.feature_mixer.l1", f"{theirs}.feature_mixer.l2")
    made.linear(f"{own}.glu.out_proj", f"{theirs}.feature_mixer.l3")
    made.linear(f"{kernel}.rpe.input", f"{toep}.rpe.pos_proj")
    for layer in range(rpe_layers):
        made.linear(f"{kernel}.rpe.hidden.{layer}", f"{toep}.rpe.layers.{layer}.2")
    made.linear(f"{kernel}.rpe.output", f"{toep}.rpe.out.2")
    if gamma is None:
        # The last bias has one entry per channel, and lends its dtype.
        ones = Rule((f"{toep}.rpe.out.2.bias",), lambda bias: bias.new_ones(channels))
        made.rules[f"{kernel}.decays"] = ones
    else:
        made.rules[f"{kernel}.decays"] = Rule((f"{toep}.gamma",), lambda gamma: gamma.flatten())
