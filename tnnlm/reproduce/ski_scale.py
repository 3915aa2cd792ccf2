"""What is trained and how much, at every size of the experiment on the frequency-domain TNN."""

from __future__ import annotations

import copy
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from tnnlm.config import Config, FDTNOConfig, KernelConfig, TNOConfig
from tnnlm.config_io import load_config
from tnnlm.errors import UserError
from tnnlm.families import Family
from tnnlm.family_measure import Sizes
from tnnlm.model import CausalLM

DATA_VARIABLE = "TNNLM_WIKITEXT"
"""environment variable that names the folder of WikiText-103, for the published size"""
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
_PAPER = (
    "data.source=hub",
    "data.hub_val_split=validation",
    "data.batch_size=64",
    "model.d_model=512",
    "model.n_layers=7",
    "model.vocab_size=50264",
    "model.dropout=0.1",
    "optim.lr=1e-3",
    "optim.weight_decay=0.2",
    "optim.schedule=inverse_sqrt",
    "optim.warmup_steps=4000",
    "trainer.accumulate=2",
    "trainer.max_steps=50000",
)
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


def config_of(size: str) -> Config:
    """Settings that all models of a size share; the kernel is the TNN's.

    Raises:
        UserError: if the published size is asked for and its text is not named.
    """
    words = list(SCALES[size].settings)
    if size == "paper":
        folder = os.environ.get(DATA_VARIABLE)
        if not folder or not Path(folder, "tokenizer.json").exists():
            raise UserError(
                f"--size paper reads WikiText-103 from a folder: set {DATA_VARIABLE} to one that holds the "
                "data set (train and validation, as the hub lays it out) and GPT-2's tokenizer.json"
            )
        words += [f"data.hub_name={folder}", f"data.tokenizer={folder}/tokenizer.json"]
    return load_config(None, words)


def family_of(variant: str, config: Config) -> Family:
    """One of ``VARIANTS``, with the sizes and settings of ``config``, which it changes."""
    config.model.kernel = copy.deepcopy(VARIANTS[variant])
    with torch.device("meta"):
        params = CausalLM(config.model).n_params
    return Family(variant, config, params)
