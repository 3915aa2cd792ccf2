"""Sizes of the models that tools/gpu_check.py measures.

They repeat those of files in ``configs``, because reading a file needs a package that may be missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tnnlm.config.schema import Config, DataConfig, ModelConfig, TrainerConfig
from tnnlm.kernels import TNOConfig


@dataclass(frozen=True)
class Shape:
    """Model with the batch that it is trained on."""

    name: str
    model: ModelConfig
    batch_size: int
    """Rows per batch."""

    def config(self, device: str, precision: str, recompute: bool = False) -> Config:
        """Return the configuration of a training on one device, of the parts that its size depends on."""
        return Config(
            model=self.model,
            data=DataConfig(batch_size=self.batch_size),
            trainer=TrainerConfig(
                accelerator=device, devices=1, precision=precision, recompute=recompute, strategy="auto"
            ),
        )


def _shape(name: str, batch_size: int, decay: float, **sizes: Any) -> Shape:
    kernel = TNOConfig(decay=decay, rpe_dim=64, rpe_layers=6)
    return Shape(name, ModelConfig(**sizes, expand=3, kernel=kernel), batch_size)


DEMO = _shape("demo", 8, 0.99, d_model=256, n_layers=4, vocab_size=4096, max_length=512)
SMALL = _shape(
    "48.7M",
    64,
    0.99,
    d_model=512,
    n_layers=7,
    vocab_size=50264,
    max_length=512,
    glu_dim=512,
    final_norm="layer",
    embed_scale=True,
    dropout=0.1,
)
MEDIUM = _shape("125M", 16, 0.995, d_model=768, n_layers=12, vocab_size=50304, max_length=2048)
LARGE = _shape("1.3B", 4, 0.995, d_model=2048, n_layers=24, vocab_size=50304, max_length=2048)
FILES = {"demo": DEMO, "tnn_wt103": SMALL, "tnn_125m_fineweb": MEDIUM, "tnn_1b3_fineweb": LARGE}
"""Shapes by the configuration that has the same model and batch."""


def tiny(shape: Shape) -> Shape:
    """Return a shape of the same name with few parameters, which a CPU trains in milliseconds."""
    kernel = TNOConfig(decay=0.9, rpe_dim=8, rpe_layers=2)
    model = replace(
        shape.model, d_model=32, n_layers=2, vocab_size=300, max_length=32, glu_dim=None, kernel=kernel
    )
    return replace(shape, model=model, batch_size=2)


@dataclass(frozen=True)
class Setting:
    """Circumstances of a part."""

    device: torch.device
    tiny: bool
    """Whether to measure tiny models, which tests do on a CPU."""
    seconds: float
    """Time in which the part should finish; loops stop early when it has passed."""

    def sized(self, shape: Shape) -> Shape:
        """Return the shape to measure in place of ``shape``."""
        return tiny(shape) if self.tiny else shape
