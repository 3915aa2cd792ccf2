"""Families of language models of equal size: ours by their kernels, and Transformers as peers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments.family_peers import LearnedPositions, Peer, Transformer
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.errors import UserError
from tnnlm.models.causal_lm import CausalLM

TRANSFORMER = "transformer"
PEERS: dict[str, type[Peer]] = {TRANSFORMER: Transformer, "gpt2": LearnedPositions}
"""by name: what is compared with ours"""
TRANSFORMER_LR = 1e-3
"""their peak learning rate unless one is given: at the demo's, four times as high, they learn worse"""
SIZE_TOLERANCE = 0.03
"""how far parameters may be apart"""
_OF_FAMILY = ("conversion.", "optim.kernel_lr_scale=")


@dataclass(frozen=True)
class Family:
    """One architecture, sized and ready to train."""

    name: str
    config: Config
    """all settings; ``model.glu_dim`` is the width that makes the sizes equal"""
    params: int
    """trainable parameters"""

    @property
    def kernel(self) -> str:
        """What mixes the tokens: a kernel's name, or attention."""
        return "attention" if self.name in PEERS else self.config.model.kernel.name

    def build(self, seed: int) -> nn.Module:
        """The model in its parallel form, initialised under ``seed``."""
        torch.manual_seed(seed)
        return _model(self.name, self.config.model)


def load_families(
    files: Mapping[str, Path | None],
    base_file: Path,
    overrides: Sequence[str],
    lrs: Mapping[str, float],
) -> tuple[Config, dict[str, Family], dict[str, str]]:
    """Read the families and give each the parameters of ``base_file``'s own model.

    Args:
        files: by name, where kernel, its learning rate and conversion are read; None for ``PEERS``.
        base_file: everything else, for all of them.
        overrides: words ``key=value``, for all of them.
        lrs: peak learning rates that differ, by name.

    Returns:
        the base configuration, the families, and by name why others can't be used.

    Raises:
        UserError: for a wrong setting, and if no family is left.
    """
    for word in overrides:
        if word.startswith("model.kernel"):
            raise UserError(f"{word}: kernels are set in each family's file, --families NAME=FILE")
    base = load_config(base_file, overrides)
    if base.task != "causal":
        raise UserError(f"task={base.task}: families are compared as causal language models; leave task out")
    own = [word for word in overrides if word.startswith(_OF_FAMILY)]
    families: dict[str, Family] = {}
    left_out: dict[str, str] = {}
    for name, file in files.items():
        try:
            families[name] = _load(name, file, base, own, lrs.get(name))
        except UserError as error:
            left_out[name] = str(error)
    if not families:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    return base, families, left_out


def _load(name: str, file: Path | None, base: Config, overrides: Sequence[str], lr: float | None) -> Family:
    config = copy.deepcopy(base)
    if file is None:
        config.optim.lr = TRANSFORMER_LR
    else:
        own = load_config(file, overrides)
        config.model.kernel = own.model.kernel
        config.optim.kernel_lr_scale = own.optim.kernel_lr_scale
        config.conversion = own.conversion
    config.optim.lr = config.optim.lr if lr is None else lr

    def count(width: int) -> int:
        config.model.glu_dim = width
        with torch.device("meta"):
            return n_params(_model(name, config.model))

    with torch.device("meta"):
        target = CausalLM(base.model).n_params
    width = match_width(count, target)
    params = count(width)
    if abs(params - target) > SIZE_TOLERANCE * target:
        raise UserError(
            f"no width of its channel mixing brings its parameters within {SIZE_TOLERANCE:.0%} of "
            f"{target:,}; the closest has {params:,}: change model.glu_dim, or its kernel"
        )
    return Family(name, config, params)


def match_width(count: Callable[[int], int], target: int) -> int:
    """The width, 1 or more, whose ``count`` is closest to ``target``; counts must grow with it."""
    low, high = 1, 2
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((low, high), key=lambda width: abs(count(width) - target))


def n_params(model: nn.Module) -> int:
    """Trainable parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _model(name: str, config: ModelConfig) -> nn.Module:
    return PEERS[name](config) if name in PEERS else CausalLM(config)
