"""Key maps: which tensors of a checkpoint of another implementation each tensor of a model is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, ConfigError
from tnnlm.models.causal_lm import CausalLM

SHOWN = 4
"""Number of keys that an error message lists."""


def joined(*tensors: Tensor) -> Tensor:
    """Return tensors concatenated along their first axis, such as the weights of two projections."""
    return torch.cat(tensors)


class Rule(NamedTuple):
    """Origin of one tensor of a model."""

    keys: tuple[str, ...]
    """Keys of the tensors that it is made from."""
    make: Callable[..., Tensor] = joined
    """Function of these tensors that returns it."""


@dataclass
class Plan:
    """Settings of a model and the origin of each of its tensors."""

    settings: dict[str, Any]
    """Settings that the shapes of the weights determine, by full key."""
    rules: dict[str, Rule] = field(default_factory=dict)
    """Origin of each tensor by its name in the model."""
    tied: dict[str, str] = field(default_factory=dict)
    """Keys of tensors that must equal another one, with the key of that."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of keys without an effect on the outputs."""
    required: dict[str, str] = field(default_factory=dict)
    """Settings that the weights don't show and that have no default, with what to set them to."""

    def linear(self, own: str, *theirs: str) -> None:
        """Add the rules of a linear layer with a bias; several of theirs are the parts of one of ours."""
        for part in ("weight", "bias"):
            self.rules[f"{own}.{part}"] = Rule(tuple(f"{name}.{part}" for name in theirs))


class Keys:
    """Tensors of a checkpoint, for questions about sizes that raise an error if a key is missing."""

    def __init__(self, weights: Mapping[str, Tensor], path: Path, title: str) -> None:
        self.weights = weights
        self.path = path
        self.title = title

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            CheckpointError: If it is missing, has another number of axes, or is empty.
        """
        if key not in self.weights:
            raise CheckpointError(f"{self.path}: is not a whole {self.title} checkpoint: it lacks {key}")
        found = tuple(self.weights[key].shape)
        if len(found) != axes or 0 in found:
            raise CheckpointError(
                f"{self.path}: {key} has the shape {list(found)}, but {self.title} has {axes} axes there, "
                "none of size 0"
            )
        return found

    def count(self, pattern: str) -> int:
        """Return one more than the largest index that the group of ``pattern`` matches in any key."""
        found = (re.match(pattern, key) for key in self.weights)
        # Every layer has weights, so that an index past the number of keys is not one of a whole model.
        indices = (int(match[1][:9]) for match in found if match)
        return 1 + max((index for index in indices if index < len(self.weights)), default=-1)

    def prefix(self, pattern: str) -> str:
        """Return what precedes ``pattern`` in the first key that contains it; empty if none does."""
        found = (re.match(f"(.*?){pattern}", key) for key in self.weights)
        return next((match[1] for match in found if match), "")


def translate(
    plan: Plan, weights: Mapping[str, Tensor], path: Path, title: str, overrides: Sequence[str]
) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the tensors of the model that a checkpoint holds.

    Args:
        plan: Settings and key map.
        weights: Tensors of the checkpoint.
        path: Path of the checkpoint, for errors.
        title: Name of the format, for errors.
        overrides: Settings ``key=value`` that the weights don't determine.

    Raises:
        CheckpointError: If keys are missing, unexpected or of another shape; the message lists them.
        ConfigError: If an override is invalid, or a setting that the weights don't show is not given.
    """
    for key, what in plan.required.items():
        if not any(word.startswith(f"{key}=") for word in overrides):
            raise ConfigError(f"{key}: is not in the weights of {path}", f"set it to {what}")
    used = {key for rule in plan.rules.values() for key in rule.keys}
    ignored = "|".join(plan.ignored)
    unexpected = [key for key in weights if key not in used | {*plan.tied} and not re.fullmatch(ignored, key)]
    missing = sorted(used - {*weights})
    if missing:
        raise _incomplete(path, title, lacks=missing, unexpected=unexpected)
    words = [f"{key}={_word(value)}" for key, value in plan.settings.items()]
    config = load_config(None, [*words, "data.source=files", "data.tokenizer=tokenizer.json", *overrides])
    with torch.device("meta"):
        expected = CausalLM(config.model).state_dict()
    made = {name: _made(plan.rules[name], weights) for name in expected if name in plan.rules}
    wrong = [
        f"{plan.rules[name].keys[0]} ({list(made[name].shape)} instead of {list(expected[name].shape)})"
        for name in made
        if made[name].shape != expected[name].shape
    ]
    more = [name for name in expected if name not in made]
    if wrong or unexpected or more:
        raise _incomplete(path, title, lacks=more, unexpected=unexpected, wrong=wrong)
    _check_tied(plan.tied, weights, path)
    return config, made


def _made(rule: Rule, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of a rule, in float32, or in float64 if its origin is; empty if the shapes differ."""
    found = [weights[key] for key in rule.keys]
    parts = [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in found]
    try:
        return rule.make(*parts).contiguous()
    except (RuntimeError, IndexError):
        return torch.empty(0)


def _check_tied(tied: Mapping[str, str], weights: Mapping[str, Tensor], path: Path) -> None:
    for key, other in tied.items():
        if key in weights and not torch.equal(weights[key], weights[other]):
            raise CheckpointError(f"{path}: {key} differs from {other}, and only tied heads are supported")


def _incomplete(
    path: Path,
    title: str,
    *,
    lacks: Sequence[str],
    unexpected: Sequence[str],
    wrong: Sequence[str] = (),
) -> CheckpointError:
    """Return the error for a checkpoint with missing or unexpected keys, or tensors of another shape."""
    found = {"it lacks": lacks, "it has the unexpected": unexpected, "of another shape are": wrong}
    listed = ", ".join(f"{what} {_listed(keys)}" for what, keys in found.items() if keys)
    return CheckpointError(f"{path}: is not a whole {title} checkpoint: {listed}")


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
