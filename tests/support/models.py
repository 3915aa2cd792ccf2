"""Configurations of tiny models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tnnlm.config.schema import ModelConfig
from tnnlm.kernels import FDTNOConfig, HyenaConfig, KernelConfig, RTFConfig, SGConvConfig, TNOConfig
from tnnlm.models.causal_lm import CausalLM, ModelState

FAMILIES: dict[str, Callable[[], KernelConfig]] = {
    "tno": lambda: TNOConfig(rpe_dim=8, rpe_layers=2),
    "fd_tno": lambda: FDTNOConfig(name="fd_tno", rpe_dim=8, rpe_layers=2),
    "sgconv": lambda: SGConvConfig(name="sgconv", kernel_dim=4, decay_max=3.0),
    "rtf": lambda: RTFConfig(name="rtf", state_size=6, denominators=3, constraint="montel"),
    "hyena": lambda: HyenaConfig(name="hyena", width=8, layers=1, bands=2, frequency=2.0),
}
"""Settings of a small kernel, by family."""


def tiny_config(**changes: object) -> ModelConfig:
    """Return the configuration of a model with a few thousand parameters."""
    settings = {"d_model": 16, "n_layers": 2, "vocab_size": 300, "max_length": 32}
    return ModelConfig(**{**settings, "kernel": FAMILIES["tno"](), **changes})


def run_steps(model: CausalLM, tokens: torch.Tensor, state: ModelState) -> tuple[torch.Tensor, ModelState]:
    """Return the logits of tokens (B, L), computed step by step, and the last state."""
    outputs = []
    for t in range(tokens.shape[1]):
        logits, state = model.step(tokens[:, t], state)
        outputs.append(logits)
    return torch.stack(outputs, dim=1), state
