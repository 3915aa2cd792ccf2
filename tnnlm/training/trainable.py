"""Model of a run with the parameters that it trains: without frozen ones, or with adapters alone."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from tnnlm.config.init import LoRAConfig
from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError, install_command
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights
from tnnlm.models.encoders import MaskedLM, SequenceClassifier
from tnnlm.models.factory import build_model

_SHOWN = 3
"""Number of names that an error suggests."""


def build_trainable(config: Config) -> CausalLM | MaskedLM | SequenceClassifier:
    """Build the untrained model for ``config.task``, with frozen parameters or adapters of ``config.init``.

    Raises:
        ConfigError: If a pattern matches nothing or everything, or peft is not installed.
    """
    model = build_model(config)
    freeze(model, config.init.freeze)
    if config.init.lora.rank is not None:
        _add_adapters(model, config.init.lora)
    return model


def check_trainable_parts(config: Config) -> None:
    """Check ``init.freeze`` and ``init.lora`` against the model, which is built on the meta device.

    Raises:
        ConfigError: If a pattern matches nothing or everything, or peft is not installed.
    """
    if config.init.freeze or config.init.lora.rank is not None:
        with without_weights():
            build_trainable(config)


def n_frozen(model: nn.Module) -> int:
    """Return the number of parameters that are not trained; buffers, such as decays, are no parameters."""
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters whose names match one of the patterns from training.

    Raises:
        ConfigError: If a pattern matches no parameter, or together they match all of them.
    """
    named = dict(model.named_parameters())
    for name in _matched("init.freeze", patterns, named, "parameter"):
        named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(f"init.freeze={','.join(patterns)}: leaves nothing to train", "omit a pattern")


def _add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Add an adapter to the linear layers that ``config`` selects, and freeze all other parameters."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            f"init.lora.rank={config.rank}: needs the package peft", f"run: {install_command('lora')}"
        ) from None
    inside = {
        id(part) for kernel in model.modules() if isinstance(kernel, Kernel) for part in kernel.modules()
    }
    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and id(layer) not in inside
    ]
    targets = _matched("init.lora.targets", config.targets or ["blocks.*"], layers, "linear layer")
    assert config.rank is not None
    # peft divides alpha by the rank, and initialises the matrix that is multiplied last with zeros.
    made = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    with warnings.catch_warnings():
        # It warns of tied embeddings, which have no adapter here.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        inject_adapter_in_model(made, model)


def _matched(setting: str, patterns: Sequence[str], names: Iterable[str], kind: str) -> list[str]:
    """Return the names that match one of the patterns.

    Raises:
        ConfigError: If a pattern matches none; the error suggests similar ones.
    """
    names, found = list(names), dict[str, None]()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"{setting}={pattern}: matches no {kind}", _similar(pattern, names))
        found |= dict.fromkeys(matched)
    return list(found)


def _similar(pattern: str, names: Sequence[str]) -> str:
    """Return the remedy for a pattern that matches nothing: similar names, or some of all."""
    if any(name.startswith(f"{pattern.rstrip('.*')}.") for name in names):
        return f"did you mean {pattern.rstrip('.*')}.*?"
    if any(name.endswith(f".{pattern.lstrip('*.')}") for name in names):
        return f"did you mean *.{pattern.lstrip('*.')}?"
    near = difflib.get_close_matches(pattern, names, n=_SHOWN, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"the names are {', '.join(names[:_SHOWN])}, ..."
