"""Training checkpoints with attached recurrences.

A checkpoint is Lightning's dict with an additional entry ``tnnlm`` of plain data and tensors, which
``torch.load(weights_only=True)`` accepts. If it is sharded, its large tensors are in other files; see
:mod:`tnnlm.checkpoints.shards`. This module must not import training code.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tnnlm.checkpoints.adapters import without_adapters
from tnnlm.checkpoints.archive import archive_fault
from tnnlm.checkpoints.converted import FORMAT, ConvertedModel, check_tokenizer, model_fingerprint
from tnnlm.checkpoints.membership import check_member
from tnnlm.checkpoints.shards import SHARDS, SUFFIX, load_model_weights, shards_of
from tnnlm.checkpoints.weights import check_finite, check_sizes, check_stored, load_weights
from tnnlm.config.loader import config_from_dict, config_to_dict
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, UserError, command
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights
from tnnlm.models.encoders import MaskedLM, SequenceClassifier
from tnnlm.models.factory import build_model
from tnnlm.models.surgery import attach
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params, to_device
from tnnlm.reading import ANOTHER, check_regular
from tnnlm.tokenizer import TextTokenizer
from tnnlm.trust import NO_CODE, Trust

ENTRY = "tnnlm"
"""Key of this package's entry in a checkpoint."""
_PREFIX = "model."
_POSITION = "TextDataModule"
"""Key of the position in the data, which a training on the data of its configuration saves."""


@dataclass(frozen=True)
class AttachedSSM:
    """Recurrences attached to a checkpoint."""

    method: str
    """Conversion method."""
    horizon: int
    """Number of lags for which the recurrences are meant to equal the kernels."""
    layers: list[Params]
    """Parameters of each layer's recurrence."""


@dataclass(frozen=True)
class TrainedCheckpoint:
    """Loaded checkpoint of a causal language model."""

    path: Path
    config: Config
    tokenizer: TextTokenizer
    model: CausalLM
    step: int
    """Number of optimizer steps completed."""
    ssm: AttachedSSM | None
    """Attached recurrences, or None if the checkpoint isn't converted."""
    own_data: bool = True
    """Whether the weights were trained on the data of ``config``, and not by another loader or program."""


@dataclass(frozen=True)
class Loaded:
    """Loaded checkpoint of a model for any task."""

    config: Config
    tokenizer: TextTokenizer
    model: CausalLM | MaskedLM | SequenceClassifier


@dataclass(frozen=True)
class TrainedEncoder:
    """Loaded checkpoint of an encoder: a masked language model or a sequence classifier."""

    config: Config
    tokenizer: TextTokenizer
    model: MaskedLM | SequenceClassifier


def checkpoint_entry(config: Config, tokenizer: TextTokenizer, ssm: AttachedSSM | None) -> dict[str, Any]:
    """Return this package's entry in a checkpoint: only plain dicts, lists, numbers, strings and tensors."""
    attached = None
    if ssm is not None:
        layers = [dict(params._asdict()) for params in ssm.layers]
        attached = {"method": ssm.method, "horizon": ssm.horizon, "layers": layers}
    return {
        "format": FORMAT,
        "config": config_to_dict(config),
        "tokenizer": tokenizer.to_json(),
        "ssm": attached,
        **({} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}),
    }


def load_checkpoint(path: Path, trust: Trust = NO_CODE) -> TrainedCheckpoint:
    """Load a checkpoint of a causal language model on the CPU.

    Its kernel module, if it names one, runs only as ``trust`` allows, or if this machine ran it before.

    Raises:
        ConfigError: If the kernel module may not run.
        CheckpointError: If the checkpoint is missing, truncated, inconsistent, not from this package, or of a
            model for another task.
    """
    data = read_intact(path)
    loaded = _load_model(data, path, trust)
    config, tokenizer, model = loaded.config, loaded.tokenizer, loaded.model
    if not isinstance(model, CausalLM):
        raise CheckpointError(
            f"{path}: a model of task={config.task} can't be converted or generate text",
            "train one with task=causal, or load this one in Python "
            "with tnnlm.checkpoints.training.load_encoder",
        )
    with _consistent(path):
        ssm, step = _attached(data[ENTRY]["ssm"], path), int(data["global_step"])
    return TrainedCheckpoint(path, config, tokenizer, model.eval(), step, ssm, own_data=_POSITION in data)


def _attached(stored: dict[str, Any] | None, path: Path) -> AttachedSSM | None:
    """Return the recurrences in this package's entry of a checkpoint."""
    if not stored:
        return None
    for index, layer in enumerate(stored["layers"]):
        check_finite({f"the recurrence of layer {index}, {name}": layer[name] for name in layer}, path)
    layers = [recurrence.from_tensors(layer) for layer in stored["layers"]]
    return AttachedSSM(stored["method"], stored["horizon"], layers)


def load_encoder(path: Path, trust: Trust = NO_CODE) -> TrainedEncoder:
    """Load a checkpoint of a masked language model or a classifier on the CPU.

    Raises:
        CheckpointError: If the checkpoint is missing, truncated, inconsistent, not from this package, or of a
            causal language model.
    """
    loaded = load_any(path, trust)
    model = loaded.model
    if isinstance(model, CausalLM):
        raise CheckpointError(
            f"{path}: is a causal language model", "load it with tnnlm.checkpoints.training.load_checkpoint"
        )
    return TrainedEncoder(loaded.config, loaded.tokenizer, model.eval())


def load_any(path: Path, trust: Trust = NO_CODE) -> Loaded:
    """Load a checkpoint of a model for any task on the CPU.

    Raises:
        CheckpointError: If the checkpoint is missing, truncated, inconsistent, or not from this package.
    """
    return _load_model(read_intact(path), path, trust)


def _load_model(data: dict[str, Any], path: Path, trust: Trust) -> Loaded:
    with _consistent(path):
        entry = data[ENTRY]
        config = config_from_dict(entry["config"], str(path), trust)
        tokenizer = TextTokenizer.from_json(entry["tokenizer"], config.data.eos_token, str(path))
        template = entry.get("chat_template")
        tokenizer.chat_template = None if template is None else str(template)
        check_member(path, config, tokenizer)
        weights = {
            key.removeprefix(_PREFIX): value
            for key, value in load_model_weights(path, data).items()
            if key.startswith(_PREFIX)
        }
        check_stored(weights, path)
        lora = config.init.lora
        if lora.rank is not None:
            weights = without_adapters(weights, lora.rank, lora.alpha)
        check_sizes(config.model, weights, path)
        check_finite(weights, path)
        with without_weights():
            model = build_model(config)
        load_weights(model, weights, path)
        check_tokenizer(tokenizer, model, path)
    return Loaded(config, tokenizer, model)


@contextmanager
def _consistent(path: Path) -> Iterator[None]:
    """Raise a CheckpointError for an entry that is missing or of another type than this package saves."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{path}: is damaged, or of another version of tnnlm ({type(error).__name__})"
        raise CheckpointError(reason, ANOTHER) from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the raw dict of a training checkpoint, with its tensors memory-mapped on the CPU.

    Everything but the values of tensors is verified. A sharded checkpoint is returned without the tensors in
    its shards.

    Raises:
        CheckpointError: If the checkpoint is missing, truncated, or not from this package, or if one of its
            shards is missing or truncated.
    """
    return _read(path, verify=False)


def read_intact(path: Path) -> dict[str, Any]:
    """Return the raw dict of a training checkpoint after its checksums are verified, which reads all of it.

    Raises:
        CheckpointError: If the checkpoint is missing, corrupt, or not from this package.
    """
    return _read(path, verify=True)


def _read(path: Path, verify: bool) -> dict[str, Any]:
    check_regular(path, ANOTHER, missing="no such checkpoint")
    fault = archive_fault(path, tensors=verify)
    if fault is not None:
        raise CheckpointError(f"{path}: is not a checkpoint, or damaged ({fault})", ANOTHER)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception:  # torch raises many types for damaged and foreign files
        raise CheckpointError(f"{path}: is not a checkpoint of PyTorch", ANOTHER) from None
    entry = data.get(ENTRY) if isinstance(data, dict) else None
    if entry is None and isinstance(data, dict) and "pytorch-lightning_version" in data:
        raise CheckpointError(
            f"{path}: was saved by lightning.Trainer without settings and tokenizer",
            "train with LitModel(config, tokenizer), or write it with tnnlm.save after "
            "LitModel.load_from_checkpoint(FILE, config=config)",
        )
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a checkpoint of this version of tnnlm's train.py", ANOTHER)
    shards_of(path, data, verify=verify)
    return data


def delete_unreferenced(folder: Path, active: str = "") -> None:
    """Delete the folders of shards in ``folder`` that no checkpoint there names, unless one is damaged.

    Args:
        folder: Folder of checkpoints.
        active: Name of a folder to keep, whose index files are not written yet.
    """
    found = [path for path in folder.glob(f"*{SUFFIX}") if path.is_dir() and not path.is_symlink()]
    if not found:
        return
    try:
        indices = [read_checkpoint(file) for file in folder.glob("*.ckpt")]
    except (CheckpointError, OSError):  # the shards of a damaged index are unknown
        return
    kept = {active, *(data[SHARDS]["folder"] for data in indices if SHARDS in data)}
    for path in found:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def from_attached(checkpoint: TrainedCheckpoint) -> ConvertedModel:
    """Return the converted model from the recurrences attached to a checkpoint.

    Raises:
        CheckpointError: If the checkpoint has no attached recurrences.
    """
    if checkpoint.ssm is None:
        raise CheckpointError(
            f"{checkpoint.path}: is not converted", f"run: {command('convert', checkpoint.path)}"
        )
    model = attach(checkpoint.model, checkpoint.ssm.layers)
    return ConvertedModel(model, checkpoint.tokenizer, model_fingerprint(model))


def attached_ssm(layers: Sequence[Params], method: str, horizon: int) -> AttachedSSM:
    """Return recurrences moved to the CPU, ready to be stored in a checkpoint."""
    return AttachedSSM(method, horizon, [to_device(params, "cpu") for params in layers])
