"""Checks of weights from a file before and while a model is built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, isfinite

from tnnlm.config.schema import ModelConfig
from tnnlm.errors import CheckpointError
from tnnlm.models.backbone import Backbone
from tnnlm.modules import RecurrentConv
from tnnlm.reading import ANOTHER

_NAMED = 3
"""Maximum number of names of each kind in an error."""


def check_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Check that no tensor contains NaN or infinity.

    Raises:
        CheckpointError: If one does; the message names the first.
    """
    for name, tensor in tensors.items():
        # The sum is finite only if all values are, and needs no memory; it may overflow although they are.
        if not isfinite(tensor.sum()) and not isfinite(tensor).all():
            raise CheckpointError(f"{where}: {name} contains NaN or infinity", ANOTHER)


def check_stored(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Check that every element of every tensor is stored.

    By a stride of 0, a checkpoint of a few bytes may claim a tensor that is larger than memory.

    Raises:
        CheckpointError: If a tensor has more elements than its storage.
    """
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{where}: {name} has more elements than are stored", ANOTHER)


def check_sizes(config: ModelConfig, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Check that settings don't claim more layers or a larger embedding than the weights have.

    A model is built before its weights are compared with it, which would take very long for a false claim.

    Raises:
        CheckpointError: If they do.
    """
    rows = next((tensor for name, tensor in tensors.items() if name.endswith("embedding.weight")), None)
    last = f".blocks.{config.n_layers - 1}."
    claims = [value for key, value in asdict(config.kernel).items() if key.endswith("layers")]
    if (
        (rows is not None and [*rows.shape] != [config.vocab_size, config.d_model])
        or not any(last in f".{name}" for name in tensors)
        or any(value > len(tensors) for value in claims)
    ):
        raise CheckpointError(f"{where}: its weights don't fit its configuration", ANOTHER)


def load_weights(model: Backbone, weights: dict[str, Tensor], where: Path) -> None:
    """Load weights into a model on the meta device whose recurrences, if any, already have their values.

    Raises:
        CheckpointError: If a name is missing or unexpected, or a shape doesn't match.
    """
    own = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, RecurrentConv)
        for buffer, _ in module.named_buffers()
    }
    try:
        missing, unexpected = model.load_state_dict(weights, assign=True, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{where}: its weights don't fit its configuration: {str(error).splitlines()[-1].strip()}"
        ) from None
    faults = {"missing": [key for key in missing if key not in own], "unexpected": unexpected}
    if any(faults.values()):
        named = "; ".join(f"{fault}: {_listed(keys)}" for fault, keys in faults.items() if keys)
        raise CheckpointError(f"{where}: its weights don't fit its configuration ({named})", ANOTHER)


def _listed(keys: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = [f"{len(keys) - _NAMED} more"] if len(keys) > _NAMED else []
    return ", ".join([*keys[:_NAMED], *more])
