"""What is trained and how much, at every size of the experiment on the frequency-domain TNN."""

from __future__ import annotations

import copy
import sysconfig
from typing import NamedTuple

import torch

from experiments.family_measure import Sizes
from experiments.frame import CONFIGS
from experiments.sizing import Family, text_words
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.kernels import FDTNOConfig, KernelConfig, TNOConfig
from tnnlm.models.causal_lm import CausalLM

ACTIVATIONS = ("gelu", "silu", "relu")
VARIANTS: dict[str, KernelConfig] = {
    "tnn": TNOConfig(),
    "tnn, decay 0.9": TNOConfig(decay=0.9),
    **{f"fd {name}": FDTNOConfig(name="fd_tno", activation=name) for name in ACTIVATIONS},
    "fd relu, angle": FDTNOConfig(name="fd_tno", activation="relu", rpe_input="angle"),
}
"""By name, all with the published position encoder, 6 layers of 64: the TNN, one with a memory as short as
untrained frequency-domain kernels have, and those; the last as in the authors' code."""


class Scale(NamedTuple):
    """What a size of the experiment means."""

    settings: tuple[str, ...]
    seeds: dict[int, tuple[str, ...]]
    """models trained on each"""
    sizes: Sizes
    """of the perplexities in parallel"""
    form_tokens: int
    """that recurrent forms are scored on, at one and at eight training lengths"""
    lengths: tuple[int, ...]
    """tokens of a timed row"""
    turns: int
    grid: int
    """training length of the kernels whose decay is looked at"""
    timed: tuple[str, ...] = ()
    """settings of the models whose steps are timed, over the others"""


_DEMO = (
    "data.source=stdlib",
    "data.batch_size=8",
    "model.d_model=128",
    "model.n_layers=3",
    "model.vocab_size=2048",
    "optim.lr=4e-3",
    "optim.warmup_steps=50",
    "trainer.max_steps=400",
)
_TINY = (
    f"data.files=[{sysconfig.get_path('stdlib')}/email/*.py]",
    "data.source=files",
    "data.val_fraction=0.2",
    "data.batch_size=4",
    "model.d_model=16",
    "model.n_layers=2",
    "model.vocab_size=300",
    "model.max_length=32",
    "optim.lr=4e-3",
    "optim.warmup_steps=5",
    "trainer.max_steps=20",
    "trainer.accelerator=cpu",
)
_PAPER = ("optim.lr=1e-3",)
"""over configs/tnn_wt103.yaml, as the authors' script has it"""
SCALES = {
    "tiny": Scale(
        _TINY,
        {0: tuple(VARIANTS)},
        Sizes(val_tokens=1 << 10, tokens=1 << 9, multiples=(1, 2)),
        1 << 8,
        (32, 64),
        3,
        256,
    ),
    "small": Scale(
        _DEMO,
        {0: tuple(VARIANTS), 1: ("tnn", "fd gelu")},
        Sizes(val_tokens=1 << 16, tokens=1 << 14),
        1 << 12,
        (512, 2048, 8192),
        9,
        2048,
        ("model.d_model=256", "model.n_layers=4", "model.vocab_size=4096"),
    ),
    "paper": Scale(_PAPER, {0: tuple(VARIANTS)}, Sizes(), 1 << 16, (512, 2048, 8192), 20, 2048),
}


def config_of(size: str, data: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> Config:
    """Settings that all models of a size share; the kernel is the TNN's.

    Args:
        size: of ``SCALES``.
        data: text files in the place of its own text.
        words: more settings, ``key=value``.
    """
    file = CONFIGS / "tnn_wt103.yaml" if size == "paper" else None
    return load_config(file, [*SCALES[size].settings, *text_words(data), *words])


def family_of(variant: str, config: Config) -> Family:
    """One of ``VARIANTS``, with the sizes and settings of ``config``, which it changes."""
    config.model.kernel = copy.deepcopy(VARIANTS[variant])
    with torch.device("meta"):
        params = CausalLM(config.model).n_params
    return Family(variant, config, params)
