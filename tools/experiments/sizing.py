"""Families of language models with equal parameters on one corpus: long convolutions and Transformers.

The settings are those of ``configs/``, so that users can reproduce them: the demo's with fewer channels at
size small, to train on more tokens; those of WikiText-103, from the hub unless files are given, at paper.
"""

from __future__ import annotations

import copy
import functools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from experiments.frame import CONFIGS, Declarations, Files
from experiments.peers import GPT2, Llama, Peer
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.data.packing import PackedCorpus, PackedRows, prepare
from tnnlm.data.tasks import split_rows
from tnnlm.errors import UserError
from tnnlm.kernels import TNOConfig
from tnnlm.models.causal_lm import CausalLM

PEERS: dict[str, type[Peer]] = {"transformer": Llama, "gpt2": GPT2}
"""Baselines from ``transformers``, by name."""
SIZE_TOLERANCE = 0.03
"""Largest relative difference of the parameter counts."""
TRAINED = 512
"""Training length, in tokens, of the published decay."""
TEXTS = Declarations("sizing")


@dataclass(frozen=True)
class Family:
    """An architecture with the size and settings to train it with."""

    name: str
    config: Config
    """Configuration, with the ``model.glu_dim`` that makes the parameter counts equal."""
    params: int
    """Number of trainable parameters."""

    def build(self, seed: int) -> nn.Module:
        """Build the model in its parallel form, initialised with ``seed``."""
        torch.manual_seed(seed)
        return _model(self.name, self.config.model)


class TextModels(NamedTuple):
    """Families to train, and their corpus."""

    families: dict[str, Family]
    corpus: PackedCorpus
    rows: PackedRows
    """Rows of the training split."""


@functools.cache
def text_models(
    names: tuple[str, ...], size: str, steps: int, data: Files, files: tuple[tuple[str, Path], ...] = ()
) -> TextModels:
    """Return families with as many parameters as the TNN, and the corpus to train them on.

    Args:
        names: Families: tnn, sgconv, rtf, those of ``PEERS`` and of ``files``.
        size: One of ``SIZES``.
        steps: Optimizer steps; 0: those of the configuration.
        data: Text files or globs; empty: the data set of the configuration.
        files: Names of custom families, with the configuration files of their kernels.

    Raises:
        UserError: If a family or the data can't be used.
    """
    sizes = TEXTS.sizes(size)
    words = [*sizes["settings"], *text_words(data), *([f"trainer.max_steps={steps}"] if steps else [])]
    kernels = {name: CONFIGS / f"{file}.yaml" for name, file in sizes["configs"].items()} | dict(files)
    base = load_config(kernels["tnn"], words)
    families = {}
    for name in names:
        try:
            families[name] = _sized(name, kernels.get(name), base, sizes["transformer_lr"])
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for family in families.values():
        kernel = family.config.model.kernel
        if isinstance(kernel, TNOConfig):  # keeps the memory in training lengths
            kernel.decay **= TRAINED / base.model.max_length
    corpus = prepare(base.data, base.model.vocab_size, base.seed)
    return TextModels(families, corpus, split_rows(corpus, base)[0])


def _sized(name: str, file: Path | None, base: Config, peer_lr: float) -> Family:
    """Return a family with the kernel and conversion of a file, and all other settings of ``base``."""
    config = copy.deepcopy(base)
    if file is None:
        config.optim.lr = peer_lr
    else:
        own = load_config(file, [])
        config.model.kernel = own.model.kernel
        config.optim.kernel_lr_scale = own.optim.kernel_lr_scale
        config.conversion = own.conversion
    params = match_parameters(partial(_model, name), config.model, partial(CausalLM, base.model))
    return Family(name, config, params)


def match_parameters(
    build: Callable[[ModelConfig], nn.Module],
    config: ModelConfig,
    other: Callable[[], nn.Module],
    count: Callable[[nn.Module], int] | None = None,
) -> int:
    """Set ``config.glu_dim`` so that a model has as many parameters as another, and return their number.

    Args:
        build: Builds the model.
        config: Configuration of the model, changed in place.
        other: Builds the other model.
        count: Returns the number of parameters of a model; None: all trainable ones.

    Raises:
        UserError: If no width brings them within ``SIZE_TOLERANCE``.
    """

    def size(width: int) -> int:
        config.glu_dim = width
        return size_of(partial(build, config), count)

    target = size_of(other, count)
    params = size(match_width(size, target))
    if abs(params - target) > SIZE_TOLERANCE * target:
        raise UserError(
            f"model.glu_dim: no width brings the parameters within {SIZE_TOLERANCE:.0%} of {target:,}; "
            f"the closest has {params:,}: change the kernel"
        )
    return params


def size_of(build: Callable[[], nn.Module], count: Callable[[nn.Module], int] | None = None) -> int:
    """Count the parameters of a model without allocating them; ``count`` as in :func:`match_parameters`."""
    with torch.device("meta"):
        return (count or n_params)(build())


def match_width(count: Callable[[int], int], target: int) -> int:
    """Return the width, at least 1, whose ``count`` is closest to ``target``; counts must grow with it."""
    high = 2
    while count(high) < target:
        high *= 2
    enough = bisect_left(range(high), target, lo=2, key=count)
    return min((enough - 1, enough), key=lambda width: abs(count(width) - target))


def n_params(model: nn.Module) -> int:
    """Return the number of trainable parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def text_words(data: Files) -> list[str]:
    """Return the settings ``key=value`` that select the given files or globs, in rows of whole documents."""
    protocol = "data.protocol=documents"
    if not data:
        return [protocol]
    # The empty list drops the files of the experiment, which a repeated setting would be added to.
    return [protocol, "data.source=files", "data.files=[]", *(f"data.files={path}" for path in data)]


def _model(name: str, config: ModelConfig) -> nn.Module:
    return PEERS[name](config) if name in PEERS else CausalLM(config)
