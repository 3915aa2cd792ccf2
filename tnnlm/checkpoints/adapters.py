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


def without_adapters(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights of a model whose layers give the same outputs as with their adapters.

    Args:
        weights: Weights with those of the adapters.
        scale: Factor of the adapters, ``alpha`` / ``rank``.

    Raises:
        KeyError: If one of the two matrices of an adapter is missing.
        ValueError: If their product has another shape than the weight.
    """
    found = {plain: weights[name] for plain, name in plain_names(weights).items()}
    for name, down in weights.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            weight = found[f"{layer}.weight"]
            up = weights[f"{layer}{UP}"]
            if (up.shape[0], down.shape[-1]) != weight.shape:
                raise ValueError(f"{layer}: the adapter has another shape than its layer")
            added = scale * (up.double() @ down.double())
            found[f"{layer}.weight"] = (weight.double() + added).to(weight.dtype)
    return found
