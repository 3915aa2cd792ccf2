"""Families of language models of equal size: ours by their kernels, and a Transformer as the peer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tnnlm.config import Config, ModelConfig
from tnnlm.config_io import load_config
from tnnlm.errors import UserError
from tnnlm.model import CausalLM

TRANSFORMER = "transformer"
TRANSFORMER_LR = 1e-3
"""its peak learning rate unless one is given: at the demo's, four times as high, it learns worse"""
SIZE_TOLERANCE = 0.03
"""how far parameters may be apart"""
_OF_FAMILY = ("conversion.", "optim.kernel_lr_scale=")
_HEAD = 64


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
        return "attention" if self.name == TRANSFORMER else self.config.model.kernel.name

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
        files: by name, where kernel, its learning rate and conversion are read; None for the Transformer.
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
    return Transformer(config) if name == TRANSFORMER else CausalLM(config)


class Transformer(nn.Module):
    """A Llama of ``transformers``, with the methods of a ``CausalLM`` in both forms.

    Rotary positions, tied embeddings, no dropout; ``glu_dim`` is the width of its MLP. Its state is
    the cache of keys and values, which ``prefill`` and ``step`` change in place.

    Raises:
        UserError: if ``transformers`` is missing, or the width can't be split into heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        library = _transformers()
        width = config.d_model
        heads = [n for n in range(1, max(1, width // _HEAD) + 1) if width % (2 * n) == 0]
        if not heads:
            raise UserError(f"rotary positions need an even model.d_model, not {width}")
        settings = library.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            intermediate_size=config.glu_dim or width,
            num_hidden_layers=config.n_layers,
            num_attention_heads=heads[-1],
            num_key_value_heads=heads[-1],
            max_position_embeddings=max(1 << 14, 16 * config.max_length),
            initializer_range=0.02,
            attention_dropout=0.0,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self._new_cache = library.DynamicCache
        self.net = library.LlamaForCausalLM(settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) for tokens (B, L)."""
        logits: Tensor = self.net(input_ids=tokens, use_cache=False).logits
        return logits

    def init_state(self, batch_size: int) -> Any:
        """An empty cache, of any batch size."""
        return self._new_cache()

    def prefill(self, tokens: Tensor, state: Any, keep: int = 0) -> tuple[Tensor, Any]:
        """Read tokens (B, L) on top of the cache: logits (B, keep or L, V)."""
        out = self.net(input_ids=tokens, past_key_values=state, use_cache=True, logits_to_keep=keep)
        return out.logits, state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one token per row (B,): logits (B, V)."""
        logits, state = self.prefill(tokens[:, None], state)
        return logits[:, -1], state


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"needs the package transformers: pip install -c constraints.txt -e '.[peers]' ({error})"
        ) from None
    return transformers
