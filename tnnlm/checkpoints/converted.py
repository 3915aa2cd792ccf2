"""Converted models on disk: config.json, model.safetensors, tokenizer.json, conversion.json in a folder.

What lies beside them for others is made by :mod:`tnnlm.checkpoints.hf_files`. This module imports nothing of
training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.checkpoints.hf_files import config_entries, hf_files
from tnnlm.config.loader import config_to_dict, model_config_from_dict
from tnnlm.errors import CheckpointError, UserError, one_line
from tnnlm.files import atomic_folder, check_parents, write_text
from tnnlm.models.backbone import Backbone
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import RecurrentConv
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params
from tnnlm.tokenizer import TextTokenizer

FORMAT = 1
"""raised when what lies on disk changes"""
_PREFIX = "model."


class ConvertedModel(NamedTuple):
    """What decoding needs."""

    model: CausalLM
    tokenizer: TextTokenizer
    fingerprint: str
    """hash of the model as it was converted, whatever its weights are packed or rounded to later"""


def model_fingerprint(model: CausalLM) -> str:
    """Hash of all weights and recurrences, names and dtypes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_converted(
    folder: Path,
    model: CausalLM,
    tokenizer: TextTokenizer,
    report: ModelReport,
    force: bool = False,
) -> None:
    """Write a converted model; the folder appears whole or not at all.

    Args:
        folder: where to.
        model: converted.
        tokenizer: the one it was trained with.
        report: for conversion.json.
        force: replace a converted model.

    Raises:
        CheckpointError: if ``folder`` exists and ``force`` is not set, or is no converted model's.
    """
    check_out_folder(folder, force)
    config = {
        "format": FORMAT,
        "model": config_to_dict(model.config),
        "eos_token": tokenizer.eos_token,
        "tokenizer_sha256": tokenizer.fingerprint,
        "model_sha256": model_fingerprint(model),
        **config_entries(model, tokenizer, report),
    }
    texts = {
        "config.json": json.dumps(config, indent=2),
        "tokenizer.json": tokenizer.to_json(),
        "conversion.json": json.dumps(asdict(report), indent=2),
        **hf_files(model, tokenizer),
    }
    with atomic_folder(folder) as temporary:
        save_tensors(model.state_dict(), temporary / "model.safetensors")
        for name, text in texts.items():
            write_text(temporary / name, text)


def save_report(folder: Path, report: ModelReport) -> None:
    """Write conversion.json of a converted model again, with what was measured since; whole or not at all."""
    write_text(folder / "conversion.json", json.dumps(asdict(report), indent=2))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: if the disk is full.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # the library's own files are for their owner alone
    try:
        save_file(contiguous, path, metadata={"format": "pt"} | (metadata or {}))
        path.chmod(mode)
    except SafetensorError as error:
        # The library has the operating system's errors in the text of its own alone: a full disk is one that
        # the user can mend. Writing from memory would hold all weights twice.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def check_out_folder(folder: Path, force: bool) -> None:
    """Refuse to write over anything but, with ``force``, another converted model.

    Raises:
        CheckpointError: if ``folder`` may not be written.
    """
    if not folder.exists():
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: is a link to nothing", "give another --out")
        check_parents(folder)
        return
    if not force:
        raise CheckpointError(f"{folder}: exists already", "give another --out, or --force to replace it")
    if not is_converted(folder):
        raise CheckpointError(
            f"{folder}: is not a converted model, --force won't replace it", "give another --out"
        )


def check_unchanged(folder: Path, fingerprint: str) -> None:
    """Refuse to add files to a converted model that was removed or replaced since it was written.

    Args:
        folder: where it was written.
        fingerprint: of the model.

    Raises:
        CheckpointError: if another or none is there now.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != fingerprint:
        raise CheckpointError(f"{folder}: was removed or replaced meanwhile", "nothing was added to it")


def is_converted(folder: Path) -> bool:
    """Whether ``folder`` looks like a converted model."""
    return (folder / "conversion.json").is_file() and (folder / "config.json").is_file()


def load_converted(folder: Path) -> ConvertedModel:
    """Read a converted model on the CPU.

    Raises:
        CheckpointError: if a file is missing, damaged, or the files don't fit together.
    """
    while True:
        before = _identity(folder)
        try:
            found = _read(folder)
        except UserError:
            if _identity(folder) in (before, None):
                raise
        else:
            if _identity(folder) == before:
                return found
        # Another model was put in its place while it was read: read that.


def _identity(folder: Path) -> tuple[int, int] | None:
    """Of the folder itself, whatever its name; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read(folder: Path) -> ConvertedModel:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing", "convert again")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        # save_pretrained of tnnlm.hf writes names under the model's own.
        tensors = {
            key.removeprefix(_PREFIX): value for key, value in load_file(folder / "model.safetensors").items()
        }
        if config["format"] != FORMAT:
            raise CheckpointError(f"{folder}: made by another version of this project", "convert again")
        model_config = model_config_from_dict(config["model"], str(folder))
        eos_token, fingerprint = config["eos_token"], config["tokenizer_sha256"]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged ({one_line(error)})", "convert again") from None
    tokenizer = TextTokenizer.from_json(text, eos_token, str(folder / "tokenizer.json"))
    # Without its kernels: code that a user registered need not be here.
    convs = [RecurrentConv(_layer_params(tensors, index, folder)) for index in range(model_config.n_layers)]
    with torch.device("meta"):
        model = CausalLM(model_config, convs).eval().requires_grad_(False)
    load_weights(model, tensors, folder)
    check_tokenizer(tokenizer, model, folder)
    if tokenizer.fingerprint != fingerprint and tokenizer.ids_fingerprint != config.get(
        "tokenizer_ids_sha256"
    ):
        raise CheckpointError(
            f"{folder}: tokenizer.json is not the one this model was trained with",
            "convert again into another folder",
        )
    return ConvertedModel(model, tokenizer, config.get("model_sha256") or model_fingerprint(model))


def check_tokenizer(tokenizer: TextTokenizer, model: Backbone, where: Path) -> None:
    """Refuse a tokenizer that has more entries than the model's embedding.

    Raises:
        CheckpointError: naming both sizes.
    """
    if tokenizer.size > model.config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.size} tokens, the model only {model.config.vocab_size}"
        )


def _layer_params(tensors: dict[str, Tensor], index: int, folder: Path) -> Params:
    prefix = f"blocks.{index}.mixer.conv."
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    try:
        return recurrence.from_tensors(own)
    except KeyError as error:
        raise CheckpointError(f"{folder}: model.safetensors has no {error}", "convert again") from None


def load_weights(model: Backbone, weights: dict[str, Tensor], where: Path) -> None:
    # The recurrences were put in as they are; everything else is still on the meta device.
    own = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, RecurrentConv)
        for buffer, _ in module.named_buffers()
    }
    try:
        missing, unexpected = model.load_state_dict(weights, assign=True, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{where}: its weights don't fit its configuration: {str(error).splitlines()[-1].strip()}"
        ) from None
    wrong = [key for key in (*missing, *unexpected) if key not in own]
    if wrong:
        raise CheckpointError(f"{where}: its weights don't fit its configuration: {wrong[0]}")
