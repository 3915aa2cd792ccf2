"""Key maps: which tensors of a checkpoint of another implementation each tensor of a model is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnnlm.checkpoints.importers.source import Source
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, ConfigError
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights

SHOWN = 5
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
    free: tuple[str, ...] = ()
    """Settings with a default from the weights, which an override may replace."""
    required: dict[str, str] = field(default_factory=dict)
    """Settings that the weights don't show and that have no default, with what to set them to."""

    def linear(self, own: str, *theirs: str) -> None:
        """Add the rules of a linear layer with a bias; several of theirs are the parts of one of ours."""
        for part in ("weight", "bias"):
            self.rules[f"{own}.{part}"] = Rule(tuple(f"{name}.{part}" for name in theirs))


class Keys:
    """Tensors of a checkpoint, for questions about sizes; it notes the keys that they lack."""

    def __init__(self, source: Source, title: str) -> None:
        self.path, self.weights, self._others = source
        self.title = title
        self.missing: set[str] = set()
        """Requested keys that are missing."""

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor; that of a missing one, which is noted, has the size 1 on each axis.

        Raises:
            CheckpointError: If it has another number of axes, or is empty.
        """
        if key not in self.weights:
            self.missing.add(key)
            return (1,) * axes
        found = tuple(self.weights[key].shape)
        if len(found) != axes or 0 in found:
            raise CheckpointError(
                f"{self.path}: {key} has the shape {list(found)}, but {self.title} has {axes} axes there, "
                "none of size 0"
            )
        return found

    def named(self, key: str) -> str:
        """Return a missing key for a message, marked if its value is not a tensor."""
        return f"{key} (is not a tensor)" if key in self._others else key

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


def check_overrides(overrides: Sequence[str]) -> None:
    """Check that overrides set the model alone: the run has no data, and nothing is trained.

    Raises:
        ConfigError: If one sets something else.
    """
    for word in overrides:
        if "=" in word and not word.startswith("model."):
            raise ConfigError(f"{word}: is not a setting of the model (model.*)", "omit it")


def translate(plan: Plan, keys: Keys, overrides: Sequence[str]) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the tensors of the model that a checkpoint holds.

    Args:
        plan: Settings and key map.
        keys: Tensors of the checkpoint.
        overrides: Settings ``key=value`` that the weights don't determine.

    Raises:
        CheckpointError: If keys are missing, unexpected or of another shape or type; the message lists them.
        ConfigError: If an override is invalid or the weights show its setting, or a setting that they don't
            show is not given.
    """
    _check_settings(plan, keys.path, overrides)
    weights = keys.weights
    used = {key for rule in plan.rules.values() for key in rule.keys}
    missing = (used | keys.missing) - {*weights}
    ignored = "|".join(plan.ignored)
    problems = {
        "it lacks": [keys.named(key) for key in sorted(missing)],
        "it has the unexpected": [
            key for key in weights if key not in used | {*plan.tied} and not re.fullmatch(ignored, key)
        ],
        "not of floating point are": [
            f"{key} ({str(weights[key].dtype).removeprefix('torch.')})"
            for key in sorted((used | {*plan.tied}) & {*weights})
            if not weights[key].is_floating_point()
        ],
    }
    if keys.missing:  # The sizes of the model are not known.
        raise _incomplete(keys, problems)
    words = [f"{key}={_word(value)}" for key, value in plan.settings.items()]
    config = load_config(None, [*words, "data.source=files", "data.tokenizer=tokenizer.json", *overrides])
    with without_weights():
        expected = CausalLM(config.model).state_dict()
    whole = {
        name for name in expected if name in plan.rules and not missing.intersection(plan.rules[name].keys)
    }
    made = {name: _made(plan.rules[name], weights) for name in expected if name in whole}
    problems["it lacks"] += [name for name in expected if name not in plan.rules]
    problems["of another shape are"] = [
        f"{plan.rules[name].keys[0]} ({list(made[name].shape)} instead of {list(expected[name].shape)})"
        for name in made
        if made[name].shape != expected[name].shape
    ]
    if any(problems.values()):
        raise _incomplete(keys, problems)
    _check_tied(plan.tied, weights, keys.path)
    return config, made


def _check_settings(plan: Plan, path: Path, overrides: Sequence[str]) -> None:
    """Check that overrides give the settings that the weights don't show, and no other value for the rest."""
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    for key, value in given.items():
        shown = _word(plan.settings.get(key, value))
        if value != shown and key not in plan.free:
            raise ConfigError(f"{key}={value}: follows from the weights ({shown})", "omit it")
    for key, what in plan.required.items():
        if key not in given:
            raise ConfigError(f"{key}: is not in the weights of {path}", f"set it to {what}")


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


def _incomplete(keys: Keys, problems: Mapping[str, Sequence[str]]) -> CheckpointError:
    """Return the error for a checkpoint with missing or unexpected keys, or tensors of another kind."""
    listed = ", ".join(f"{what} {_listed(found)}" for what, found in problems.items() if found)
    return CheckpointError(f"{keys.path}: is not a whole {keys.title} checkpoint: {listed}")


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
