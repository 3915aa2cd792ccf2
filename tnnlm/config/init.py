"""Settings of a run that starts from the weights of another model: frozen parameters and adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnnlm.fields import number


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters on linear layers (LoRA, arXiv 2106.09685); all other parameters are frozen.

    Requires the extra [lora]. An adapter adds ``alpha`` / ``rank`` times the product of two matrices of
    ``rank`` rows or columns to the weight of its layer; the product is added to the weight when a checkpoint
    is converted, or loaded to generate text.
    """

    rank: int | None = number(None, low=1, high=65_536)
    """Rank of the adapters (null: no adapters, all parameters are trained)."""
    alpha: float = number(16.0, above=0, high=1e6)
    """Scale of the adapters, divided by ``init.lora.rank``."""
    dropout: float = number(0.0, low=0, high=0.99)
    """Dropout probability on the inputs of the adapters."""
    targets: list[str] = field(default_factory=list)
    """Linear layers with an adapter, as patterns of their names such as ``*.mixer.*`` (empty: all linear
    layers of the blocks, except those within a kernel)."""


@dataclass(kw_only=True)
class InitConfig:
    """Weights that a new run starts from, with a new optimizer, and which of them are trained."""

    weights: str | None = None
    """Run (name or folder), checkpoint, converted folder, or name of a converted folder on the Hugging Face
    Hub (null: random weights). The tokenizer and, unless set, ``task`` and ``model.*`` are those of the
    weights."""
    freeze: list[str] = field(default_factory=list)
    """Parameters that are not trained, as patterns of their names such as ``embedding.*`` or
    ``blocks.[01].*``."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters that are trained instead of the weights."""
