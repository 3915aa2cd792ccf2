"""Formats of other implementations, how they are recognised, and the function that imports a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tnnlm.checkpoints.importers import hyenadna, rtf, sgconv, stripedhyena, tnn
from tnnlm.checkpoints.importers.keys import Keys, Plan, check_overrides, translate
from tnnlm.checkpoints.importers.source import read_weights
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights
from tnnlm.models.surgery import all_decay

AUTO = "auto"


class Format(NamedTuple):
    """Format of checkpoints."""

    title: str
    """Name of the model family, for messages."""
    mark: str
    """Regular expression that occurs in a key of this format only."""
    plan: Callable[[Keys], Plan]
    """Function that returns the settings and the key map of a checkpoint."""


FORMATS = {
    "tnn": Format("TNN", tnn.MARK, tnn.plan),
    "sgconv": Format("SGConv", sgconv.MARK, sgconv.plan),
    "rtf": Format("RTF", rtf.MARK, rtf.plan),
    "hyenadna": Format("HyenaDNA", hyenadna.MARK, hyenadna.plan),
    "stripedhyena": Format("StripedHyena", stripedhyena.MARK, stripedhyena.plan),
}
"""Supported formats by the name that ``--format`` takes."""


class Imported(NamedTuple):
    """Model of another implementation, translated."""

    format: str
    """Name of its format."""
    config: Config
    """Configuration of a run with this model; it has no data, and no name yet."""
    weights: dict[str, Tensor]
    """Tensors by their names in the model."""

    @property
    def n_params(self) -> int:
        """Number of trainable parameters, as a training run counts them: without frozen decays."""
        return self._empty_model().n_params

    @property
    def all_decay(self) -> bool:
        """Whether every kernel states a decay; see :func:`tnnlm.models.surgery.all_decay`."""
        return all_decay(self._empty_model())

    def _empty_model(self) -> CausalLM:
        with without_weights():
            return CausalLM(self.config.model)


def import_checkpoint(path: Path, format: str = AUTO, overrides: Sequence[str] = ()) -> Imported:
    """Read and translate a checkpoint of another implementation.

    Args:
        path: File of ``torch.save`` or of safetensors.
        format: One of ``FORMATS``, or ``auto`` to recognise it by the keys.
        overrides: Settings ``key=value`` that the weights don't determine, such as ``model.max_length=512``.

    Raises:
        CheckpointError: If the file is damaged, carries code, or its keys or shapes don't fit the format.
        ConfigError: If an override is invalid.
    """
    check_overrides(overrides)
    source = read_weights(path)
    name = recognise(source.weights, path) if format == AUTO else format
    title, _, plan = FORMATS[name]
    keys = Keys(source, title)
    config, made = translate(plan(keys), keys, overrides)
    return Imported(name, config, made)


def recognise(weights: Mapping[str, Tensor], path: Path) -> str:
    """Return the name of the format of a checkpoint.

    Raises:
        CheckpointError: If no format has its keys.
    """
    for name, format in FORMATS.items():
        if any(re.search(format.mark, key) for key in weights):
            return name
    raise CheckpointError(
        f"{path}: its keys, such as {next(iter(weights))}, are those of none of {', '.join(FORMATS)}",
        "give --format, to see what it lacks",
    )
