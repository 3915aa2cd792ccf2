"""Families of language models of equal size on one text: ours by their kernels, and Transformers as peers.

Settings are those of ``configs/``, so that what is measured is what a user gets: at small size the demo's
with fewer channels, so that more tokens are read; at paper size those of WikiText-103, which reads the hub
unless files are given.
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
"""by name: what is compared with ours"""
SIZE_TOLERANCE = 0.03
"""how far parameters may be apart"""
TRAINED = 512
"""length at which the published decay is set"""
TEXTS = Declarations("sizing")


@dataclass(frozen=True)
class Family:
    """One architecture, sized and ready to train."""

    name: str
    config: Config
    """all settings; ``model.glu_dim`` is the width that makes the sizes equal"""
    params: int
    """trainable parameters"""

    def build(self, seed: int) -> nn.Module:
        """The model in its parallel form, initialised under ``seed``."""
        torch.manual_seed(seed)
        return _model(self.name, self.config.model)


class TextModels(NamedTuple):
    """What is trained, and on what."""

    families: dict[str, Family]
    corpus: PackedCorpus
    rows: PackedRows
    """of the training split"""


@functools.cache
def text_models(
    names: tuple[str, ...], size: str, steps: int, data: Files, files: tuple[tuple[str, Path], ...] = ()
) -> TextModels:
    """Families of the parameters of the TNN, and the text.

    Args:
        names: of tnn, sgconv, rtf, ``PEERS`` and those of ``files``.
        size: of ``SIZES``.
        steps: optimizer steps; 0: as the configuration says.
        data: text files or globs; none: the configuration's own text.
        files: names of other families, and the files that their kernels are read from.

    Raises:
        UserError: if a family or the text can't be used.
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
        if isinstance(kernel, TNOConfig):  # reaches as many training lengths as the published one does
            kernel.decay **= TRAINED / base.model.max_length
    corpus = prepare(base.data, base.model.vocab_size, base.seed)
    return TextModels(families, corpus, split_rows(corpus, base)[0])


def _sized(name: str, file: Path | None, base: Config, peer_lr: float) -> Family:
    """A family that takes its kernel from a file and all else from ``base``."""
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
    """Set ``config.glu_dim`` so that the model has the parameters of another, and return how many.

    Args:
        build: makes the model.
        config: of the model, changed in place.
        other: makes the other.
        count: what counts as a parameter; None: all that are trained.

    Raises:
        UserError: if no width brings them within ``SIZE_TOLERANCE``.
    """

    def size(width: int) -> int:
        config.glu_dim = width
        return size_of(partial(build, config), count)

    target = size_of(other, count)
    params = size(match_width(size, target))
    if abs(params - target) > SIZE_TOLERANCE * target:
        raise UserError(
            f"no width of its channel mixing brings its parameters within {SIZE_TOLERANCE:.0%} of "
            f"{target:,}; the closest has {params:,}: change model.glu_dim, or its kernel"
        )
    return params


def size_of(build: Callable[[], nn.Module], count: Callable[[nn.Module], int] | None = None) -> int:
    """Parameters of a model that takes no memory meanwhile; ``count`` as for :func:`match_parameters`."""
    with torch.device("meta"):
        return (count or n_params)(build())


def match_width(count: Callable[[int], int], target: int) -> int:
    """The width, 1 or more, whose ``count`` is closest to ``target``; counts must grow with it."""
    high = 2
    while count(high) < target:
        high *= 2
    enough = bisect_left(range(high), target, lo=2, key=count)
    return min((enough - 1, enough), key=lambda width: abs(count(width) - target))


def n_params(model: nn.Module) -> int:
    """Trainable parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def text_words(data: Files) -> list[str]:
    """Settings ``key=value`` that read the given files or globs; none for none."""
    return ["data.source=files", f"data.files=[{','.join(map(repr, data))}]"] if data else []


def _model(name: str, config: ModelConfig) -> nn.Module:
    return PEERS[name](config) if name in PEERS else CausalLM(config)
