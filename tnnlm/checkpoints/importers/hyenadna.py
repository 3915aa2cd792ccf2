"""Key map of HyenaDNA (arXiv 2306.15794): Hyena operators of order 2 and MLPs, with LayerNorms."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tnnlm.checkpoints.importers.keys import Keys, Plan, Rule
from tnnlm.errors import CheckpointError

MARK = r"backbone\.layers\.\d+\.mixer\.filter_fn\.implicit_filter\."
"""Key that only this format has, after a prefix."""


def plan(keys: Keys) -> Plan:
    """Return the settings and the key map of a checkpoint.

    Raises:
        CheckpointError: If a key that determines a size is missing, or the operators are of another order.
    """
    prefix = keys.prefix(r"backbone\.layers\.\d+\.")
    embedding = f"{prefix}backbone.embeddings.word_embeddings.weight"
    vocab_size, d_model = keys.shape(embedding, 2)
    first = f"{prefix}backbone.layers.0"
    channels, _ = keys.shape(f"{first}.mixer.in_proj.weight", 2)
    if channels != 3 * d_model and not keys.missing:
        raise CheckpointError(
            f"{keys.path}: has Hyena operators of order {channels // d_model - 1}, and order 2 is supported"
        )
    filters = f"{first}.mixer.filter_fn"
    _, length, features = keys.shape(f"{filters}.pos_emb.z", 3)
    width, _ = keys.shape(f"{filters}.implicit_filter.0.weight", 2)
    d_hidden, _ = keys.shape(f"{first}.mlp.fc1.weight", 2)
    last = (
        keys.count(
            rf"{re.escape(prefix)}backbone\.layers\.\d+\.mixer\.filter_fn\.implicit_filter\.(\d+)\.weight"
        )
        - 1
    )
    n_layers = keys.count(rf"{re.escape(prefix)}backbone\.layers\.(\d+)\.")
    made = Plan(
        {
            "model.d_model": d_model,
            "model.vocab_size": vocab_size,
            "model.n_layers": n_layers,
            "model.max_length": length,
            "model.block": "hyena",
            "model.expand": 1,
            "model.glu_dim": d_hidden,
            "model.final_norm": "layer",
            "model.kernel.name": "hyena",
            "model.kernel.width": width,
            "model.kernel.layers": max(0, last // 2 - 1),
            "model.kernel.bands": max(1, (features - 1) // 2),
            "model.kernel.length": length,
            "model.kernel.train_encoding": True,
        },
        {"embedding.weight": Rule((embedding,))},
        {f"{prefix}lm_head.weight": embedding, "lm_head.weight": embedding},
        (r".*\.pos_emb\.t",),
        ("model.max_length",),
    )
    made.linear("norm", f"{prefix}backbone.ln_f")
    for index in range(n_layers):
        _add_layer(made, f"blocks.{index}", f"{prefix}backbone.layers.{index}", last)
    return made


def _add_layer(made: Plan, own: str, theirs: str, last: int) -> None:
    """Add the rules of one layer, whose filter network ends in the module ``last``."""
    made.linear(f"{own}.norm", f"{theirs}.norm1")
    made.linear(f"{own}.glu_norm", f"{theirs}.norm2")
    made.linear(f"{own}.mixer.in_proj", f"{theirs}.mixer.in_proj")
    made.linear(f"{own}.mixer.out_proj", f"{theirs}.mixer.out_proj")
    made.linear(f"{own}.glu.in_proj", f"{theirs}.mlp.fc1")
    made.linear(f"{own}.glu.out_proj", f"{theirs}.mlp.fc2")
    short = f"{theirs}.mixer.short_filter"
    made.rules[f"{own}.mixer.short.taps"] = Rule((f"{short}.weight",), lambda weight: weight[:, 0].flip(1))
    made.rules[f"{own}.mixer.short.bias"] = Rule((f"{short}.bias",))
    filters, kernel = f"{theirs}.mixer.filter_fn", f"{own}.mixer.conv.kernel"
    network = f"{filters}.implicit_filter"
    for module in range(0, last, 2):
        made.linear(f"{kernel}.hidden.{module // 2}", f"{network}.{module}")
    sines = tuple(f"{network}.{module}.freq" for module in range(1, last, 2))
    made.rules[f"{kernel}.frequencies"] = Rule(sines)
    made.rules[f"{kernel}.output.weight"] = Rule((f"{network}.{last}.weight",))
    made.rules[f"{kernel}.bias"] = Rule((f"{filters}.bias",))
    made.rules[f"{kernel}.deltas"] = Rule((f"{filters}.modulation.deltas",), torch.flatten)
    made.rules[f"{kernel}.encoding"] = Rule((f"{filters}.pos_emb.z",), _first)


def _first(batch: Tensor) -> Tensor:
    return batch.squeeze(0)
