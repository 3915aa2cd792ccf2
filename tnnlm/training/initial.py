"""Start of a new run from the weights of another model (``init.weights``)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnnlm.chat.stored import TOKENIZER_CONFIG, stored_template
from tnnlm.checkpoints.adapters import LORA, plain_names
from tnnlm.checkpoints.hf_files import tokenizer_settings
from tnnlm.checkpoints.parallel import load_parallel
from tnnlm.checkpoints.training import Loaded, load_any
from tnnlm.config.checks import leaves
from tnnlm.config.interpolation import escaped
from tnnlm.config.loader import Base, config_to_dict, load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, ConfigError
from tnnlm.files import cache_root, write_text
from tnnlm.kernels import Kernel, build_kernel
from tnnlm.reading import read_text
from tnnlm.tokenizer import TextTokenizer, load_tokenizer
from tnnlm.training.find_weights import find_weights, is_hub_name
from tnnlm.trust import NO_CODE, Trust

FREE = ("model.dropout", "model.kernel.module")
"""Settings of the model that may differ from those of the weights; the module of a kernel may be moved."""
LENGTHS = ("model.max_length", "model.kernel.length")
"""Settings that may differ if the kernel can continue from the weights of another length."""


class InitialWeights:
    """Weights that a new run starts from, with their tokenizer and architecture."""

    def __init__(self, target: str, runs_dir: Path = Path("runs"), trust: Trust = NO_CODE) -> None:
        """Load what ``init.weights`` names; its checksums are verified, its kernel module runs as allowed.

        Raises:
            CheckpointError: If it is missing, damaged, or a converted folder without kernels.
        """
        self.place = f"init.weights={target}"
        self.path = find_weights(target, runs_dir)
        hub = is_hub_name(target, runs_dir)
        named = self.path if self.path.is_dir() or Path(target).is_file() else self.path.parents[1]
        self.recorded = target if hub else str(named.absolute())
        """Value of ``init.weights`` that the run records: the name on the Hub, or an absolute path."""
        folder = self.path.is_dir()
        self.loaded: Loaded = load_parallel(self.path, trust) if folder else load_any(self.path, trust)
        self.continued: str | None = None
        """How the kernels continue at another training length, once :meth:`check` has found out."""

    def config(self, path: Path, overrides: Sequence[str], *, own_model: bool) -> Config:
        """Return the configuration of the new run, with the task, model and tokenizer of the weights.

        Args:
            path: YAML file of settings.
            overrides: Settings ``key=value``.
            own_model: Whether the user named the file, so that it overrides what the weights bring along.

        Raises:
            ConfigError: If the architecture or the tokenizer differs; the message lists the settings.
        """
        old = self.loaded.config
        settings: dict[str, Any] = {"task": old.task, "model": config_to_dict(old.model)}
        stored = self._tokenizer_file()
        if old.task != "classify":
            settings["data"] = {"eos_token": escaped(old.data.eos_token), "tokenizer": escaped(str(stored))}
        if old.task == "masked":
            settings["data"]["mask_token"] = escaped(str(old.data.mask_token))
        config = load_config(path, overrides, base=Base(settings, str(self.path), over_file=not own_model))
        if config.data.tokenizer == str(stored) and not stored.is_file():
            stored.parent.mkdir(parents=True, exist_ok=True)
            if self.loaded.tokenizer.chat_template is not None:
                write_text(stored.parent / TOKENIZER_CONFIG, tokenizer_settings(self.loaded.tokenizer))
            write_text(stored, self.loaded.tokenizer.to_json())
        self.check(config)
        return config

    def check(self, config: Config) -> None:
        """Check that a configuration fits the weights, and record the weights in it.

        Raises:
            ConfigError: If the architecture differs, or the kernel can't continue at another length.
            CheckpointError: If the tokenizer differs.
        """
        old, new = (_architecture(found) for found in (self.loaded.config, config))
        named = "model.kernel.name"
        if new[named] != old[named]:  # The settings of two kernels can't be compared.
            old, new = ({key: found[key] for key in ("task", named)} for found in (old, new))
        differ = [f"{key}={_shown(new.get(key))}" for key in {**old, **new} if new.get(key) != old.get(key)]
        if differ:
            there = [f"{key.partition('=')[0]}={_shown(old.get(key.partition('=')[0]))}" for key in differ]
            raise ConfigError(
                f"{self.place}: has another architecture, {', '.join(there)}",
                f"omit {', '.join(differ)}, or start without init.weights",
            )
        if config.task != "classify":
            self._check_tokens(config)
        self.continued = self._continued(config)
        config.init.weights = self.recorded

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise an error if a tokenizer, usually that of the data, is not that of the weights.

        Raises:
            CheckpointError: If they differ.
        """
        if tokenizer.fingerprint != self.loaded.tokenizer.fingerprint:
            raise CheckpointError(
                f"{self.place}: was trained with another tokenizer than that of the data",
                "omit data.tokenizer, or set it to the tokenizer of the weights",
            )

    def copy_to(self, model: nn.Module) -> None:
        """Copy the weights into the model of the new run, which may have adapters.

        Raises:
            CheckpointError: If a name is missing or unexpected.
        """
        names = plain_names(model.state_dict())
        weights = self.loaded.model.state_dict()
        taken: tuple[str, ...] = ()
        if self.continued is not None:
            trained = dict(self.loaded.model.named_modules())
            found = {name: part for name, part in model.named_modules() if isinstance(part, Kernel)}
            for name, kernel in found.items():
                kernel.continue_from(trained[name])
            taken = tuple(f"{name}." for name in found)
        rest = {names.get(key, key): value for key, value in weights.items() if not key.startswith(taken)}
        missing, unexpected = model.load_state_dict(rest, strict=False)
        missing = [key for key in missing if LORA not in key and not key.startswith(taken)]
        for fault, keys in (("lacks", missing), ("has the unexpected", unexpected)):
            if keys:
                raise CheckpointError(f"{self.place}: {fault} {', '.join(keys)}", "use other weights")

    def line(self) -> str:
        """Return the line that announces the weights of the run."""
        length = self.loaded.config.model.max_length
        how = f"; trained at {length:,} tokens, each kernel continues: {self.continued}"
        return f"weights: those of {self.path}{how if self.continued else ''}"

    def _tokenizer_file(self) -> Path:
        """Return the tokenizer.json next to the weights, or a place in the cache if there is none.

        The chat template of the weights is next to it in either place.
        """
        tokenizer = self.loaded.tokenizer
        beside = self.path if self.path.is_dir() else self.path.parent.parent
        path, template = beside.absolute() / "tokenizer.json", tokenizer.chat_template
        if path.is_file() and (template is None or stored_template(path.parent) is not None):
            with suppress(CheckpointError):  # a damaged one is not used
                if read_text(path, "") == tokenizer.to_json():
                    return path
        content = hashlib.sha256(repr((tokenizer.fingerprint, template)).encode()).hexdigest()
        return cache_root() / "tokenizers" / content[:32] / path.name

    def _check_tokens(self, config: Config) -> None:
        """Check the end token and the given tokenizer, before the data is read."""
        data, known = config.data, self.loaded.config.data
        if data.eos_token != known.eos_token:
            raise ConfigError(
                f"data.eos_token={data.eos_token}: the weights were trained with {known.eos_token}",
                "omit data.eos_token",
            )
        if data.tokenizer is None:
            raise ConfigError(
                "data.tokenizer=null: a new tokenizer doesn't fit the weights", "omit data.tokenizer"
            )
        given = load_tokenizer(data.tokenizer, data.eos_token)
        self.check_tokenizer(given if data.mask_token is None else given.with_special(data.mask_token))

    def _continued(self, config: Config) -> str | None:
        """Return how the kernels continue at the training length of a run; None if it is that of the weights.

        Raises:
            ConfigError: If they can't.
        """
        model, old = config.model, self.loaded.config.model
        if _lengths(model) == _lengths(old):
            return None
        with torch.random.fork_rng(devices=[]):
            kernel = build_kernel(model.kernel, model.expand * model.d_model, model.max_length)
        trained = next(part for part in self.loaded.model.modules() if isinstance(part, Kernel))
        how = kernel.continue_from(trained)
        if how is not None:
            return how
        ends = f"set model.kernel.length={trained.support} too" if trained.support else ""
        raise ConfigError(
            f"model.max_length={model.max_length}: the weights were trained at {old.max_length} tokens, and "
            f"the kernel {model.kernel.name} can't continue, because {kernel.fixed_because}",
            ", or ".join(filter(None, (ends, "omit model.max_length"))),
        )


def weights_for(config: Config) -> InitialWeights | None:
    """Return the weights that a new run starts from, after checks; None for random ones.

    Raises:
        ConfigError: If ``config`` doesn't fit the weights.
        CheckpointError: If they are missing, damaged, or have another tokenizer.
    """
    if config.init.weights is None:
        return None
    initial = InitialWeights(config.init.weights, trust=Trust(module=config.model.kernel.module))
    initial.check(config)
    return initial


def _architecture(config: Config) -> dict[str, Any]:
    """Return the task and the settings of the model that determine its weights and outputs, by full key."""
    classes = () if config.task == "classify" else ("model.n_classes", "model.pair")
    apart = (*FREE, *LENGTHS, *classes)
    settings = {key: value for key, value, _ in leaves(config.model, "model.") if key not in apart}
    return {"task": config.task, **settings}


def _lengths(config: Any) -> tuple[int, int]:
    """Return the training length of a model, and the length of its kernel."""
    return config.max_length, getattr(config.kernel, "length", None) or config.max_length


def _shown(value: Any) -> str:
    """Return a value as text for the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
