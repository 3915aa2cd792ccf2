"""Configuration of a new run from the command line, also of one that starts from weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tnnlm.config.loader import initial_weights, load_config
from tnnlm.config.schema import Config
from tnnlm.config.shipped import find_config
from tnnlm.trust import NO_CODE, Trust

if TYPE_CHECKING:
    from tnnlm.training.initial import InitialWeights


def configured(
    name: str, overrides: Sequence[str], *, named: bool, trust: Trust = NO_CODE
) -> tuple[Config, InitialWeights | None]:
    """Return the configuration of a new run, and the weights that ``init.weights`` selects.

    Args:
        name: Name of a shipped configuration, or path of a file.
        overrides: Settings ``key=value``.
        named: Whether the user named the configuration; its ``model.*`` settings then override those of the
            weights.
        trust: Code of the weights that may run.
    """
    path = find_config(name)
    weights = initial_weights(path, overrides, trust)
    if weights is None:
        return load_config(path, overrides, trust=trust), None
    from tnnlm.training.initial import InitialWeights

    initial = InitialWeights(weights, trust=trust)
    return initial.config(path, overrides, own_model=named), initial
