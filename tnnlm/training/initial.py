"""Start of a new run from the weights of a checkpoint, such as one that was imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tnnlm.checkpoints.locate import find_checkpoint
from tnnlm.checkpoints.training import Loaded, load_any
from tnnlm.config.checks import leaves
from tnnlm.config.interpolation import escaped
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, ConfigError
from tnnlm.tokenizer import TextTokenizer
from tnnlm.trust import NO_CODE, Trust

FREE = {"model.dropout"}
"""Settings of the model that may differ from those of the checkpoint."""
OF_ANY_LENGTH = ("tno",)
"""Kernels that don't depend on the training length."""


class InitialWeights:
    """Checkpoint that a new run starts from: its weights, tokenizer and architecture."""

    def __init__(self, target: str, runs_dir: Path = Path("runs"), trust: Trust = NO_CODE) -> None:
        """Load a run, whose best checkpoint is taken, or a checkpoint, whose kernel module runs as allowed.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        self.path = find_checkpoint(target, runs_dir)
        self.loaded: Loaded = load_any(self.path, trust)

    def config(self, path: Path, overrides: Sequence[str], *, own_model: bool) -> Config:
        """Return the configuration of the new run, with the tokenizer of the checkpoint.

        Args:
            path: YAML file of settings.
            overrides: Settings ``key=value``.
            own_model: Whether ``path`` describes the model. If not, its model is that of the checkpoint.

        Raises:
            ConfigError: If the task or the architecture differs; the message lists the settings.
            CheckpointError: If no file contains the tokenizer of the checkpoint.
        """
        words = [] if own_model else self._model_words()
        text = self.loaded.config.task != "classify"
        if text and not any(word.startswith("data.tokenizer=") for word in overrides):
            words.append(f"data.tokenizer={_shown(str(self._tokenizer_file()))}")
        config = load_config(path, [*words, *overrides])
        old, new = (_architecture(found) for found in (self.loaded.config, config))
        differ = [f"{key}={_shown(new.get(key))}" for key in {**old, **new} if new.get(key) != old.get(key)]
        if differ:
            there = [f"{key.partition('=')[0]}={_shown(old.get(key.partition('=')[0]))}" for key in differ]
            raise ConfigError(
                f"--init-from {self.path}: has another architecture, {', '.join(there)}",
                f"omit {', '.join(differ)}, or start without --init-from",
            )
        config.data.eos_token = self.loaded.config.data.eos_token
        return config

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise an error if the tokenizer of the data is not that of the checkpoint.

        Raises:
            CheckpointError: If they differ.
        """
        if tokenizer.fingerprint != self.loaded.tokenizer.fingerprint:
            raise CheckpointError(
                f"--init-from {self.path}: was trained with another tokenizer than that of the data",
                "omit data.tokenizer, or set it to the tokenizer of that run",
            )

    def copy_to(self, model: nn.Module) -> None:
        """Copy the weights into the model of the new run, which has the same architecture."""
        model.load_state_dict(self.loaded.model.state_dict())

    def _model_words(self) -> list[str]:
        settings = leaves(self.loaded.config.model, "model.")
        return [f"{key}={_shown(value)}" for key, value, _ in settings]

    def _tokenizer_file(self) -> Path:
        """Return the tokenizer.json in the folder of the checkpoint's run."""
        path = self.path.absolute().parent.parent / "tokenizer.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != self.loaded.tokenizer.to_json():
            raise CheckpointError(
                f"--init-from {self.path}: its tokenizer is not in the folder of a run",
                "give a tokenizer.json with data.tokenizer=FILE",
            )
        return path


def _architecture(config: Config) -> dict[str, Any]:
    """Return the task and the settings of the model that determine its weights and outputs, by full key."""
    found = {key: value for key, value, _ in leaves(config.model, "model.") if key not in FREE}
    if config.model.kernel.name in OF_ANY_LENGTH:
        del found["model.max_length"]
    if config.task != "classify":
        found = {key: value for key, value in found.items() if key not in ("model.n_classes", "model.pair")}
    return {"task": config.task, **found}


def _shown(value: Any) -> str:
    """Return a value as text for the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else escaped(str(value))
