"""Low-rank adapters (LoRA, arXiv 2106.09685) in the weights of a checkpoint, added to those of their layers.

The names are those of the library peft, which trains them: a layer ``x`` with an adapter has the weights
``x.base_layer.weight``, ``x.lora_A.default.weight`` (r, I) and ``x.lora_B.default.weight`` (O, r). Here only
tensors are added, so that a model converts and decodes without that library.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

BASE = ".base_layer."
"""Part of the name of a weight whose layer has an adapter."""
LORA = ".lora_"
"""Part of the names of the weights of adapters."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


def plain_names(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of the weights of a model with adapters by those that they have without."""
    return {name.replace(BASE, "."): name for name in names if LORA not in name}


def without_adapters(weights: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """Return the weights of a model whose layers give the same outputs as with their adapters.

    Args:
        weights: Weights with those of the adapters.
        rank: Rank r of the adapters.
        alpha: Scale of the adapters, which is divided by their rank.

    Raises:
        KeyError: If the layer or one of the two matrices of an adapter is missing.
        ValueError: If the matrices have other shapes than their layer and rank ask for.
    """
    found = {plain: weights[name] for plain, name in plain_names(weights).items()}
    layers = {name.removesuffix(part) for name in weights for part in (DOWN, UP) if name.endswith(part)}
    for layer in layers:
        weight, down, up = found[f"{layer}.weight"], weights[f"{layer}{DOWN}"], weights[f"{layer}{UP}"]
        n_out, n_in = weight.shape
        if [*up.shape, *down.shape] != [n_out, rank, rank, n_in]:
            raise ValueError(f"{layer}: the adapter has another shape than its layer")
        added = (alpha / rank) * (up.double() @ down.double())
        found[f"{layer}.weight"] = (weight.double() + added).to(weight.dtype)
    return found
