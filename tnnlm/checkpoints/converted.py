"""Converted models on disk: a folder with config.json, model.safetensors, tokenizer.json and conversion.json.

The additional files for Transformers come from :mod:`tnnlm.checkpoints.hf_files`. This module is deployment
code and must not import training code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tnnlm.chat.stored import stored_template
from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.checkpoints.hf_files import config_entries, hf_files
from tnnlm.checkpoints.manifest import KERNELS, REMEDY, WEIGHTS, verify_folder, write_checksums
from tnnlm.checkpoints.prompts import PROMPTS_ENTRY, usable_prompts
from tnnlm.checkpoints.weights import check_finite, check_sizes, load_weights
from tnnlm.config.loader import config_to_dict, model_config_from_dict
from tnnlm.errors import CheckpointError, UserError, one_line
from tnnlm.files import atomic_folder, check_parents, restore_replaced, write_text
from tnnlm.models.backbone import Backbone
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights
from tnnlm.modules import RecurrentConv
from tnnlm.ops import recurrence
from tnnlm.ops.recurrence import Params
from tnnlm.reading import check_regular, read_json, read_text
from tnnlm.tokenizer import TextTokenizer

FORMAT = 1
"""Version of the file format; increment it whenever the format changes."""
_PREFIX = "model."


class ConvertedModel(NamedTuple):
    """Converted model with its tokenizer, as loaded for decoding."""

    model: CausalLM
    tokenizer: TextTokenizer
    fingerprint: str
    """Hash of the model as converted, before its weights are packed or cast to another dtype."""


def model_fingerprint(model: CausalLM) -> str:
    """Return the SHA-256 hash of all weights and recurrences, with their names, dtypes and shapes."""
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
    trained: CausalLM | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """Save a converted model to a folder, atomically.

    Args:
        folder: Output folder.
        model: Converted model.
        tokenizer: Tokenizer that the model was trained with.
        report: Certificate, saved as conversion.json.
        force: Replace ``folder`` if it contains a converted model.
        trained: Model before the conversion, whose kernels are stored next to the recurrences, so that a run
            can start from the folder; None stores the recurrences alone.
        prompts: Short prompts from the text of the run, for hints.

    Raises:
        CheckpointError: If ``folder`` exists and ``force`` isn't set, or it isn't a converted model.
    """
    check_out_folder(folder, force)
    config = {
        "format": FORMAT,
        "model": config_to_dict(model.config),
        "eos_token": tokenizer.eos_token,
        "tokenizer_sha256": tokenizer.fingerprint,
        "model_sha256": model_fingerprint(model),
        **config_entries(model, tokenizer, report),
        PROMPTS_ENTRY: [*usable_prompts(prompts)],
    }
    texts = {
        "config.json": json.dumps(config, indent=2),
        "tokenizer.json": tokenizer.to_json(),
        "conversion.json": report.to_json(),
        **hf_files(model, tokenizer),
    }
    with atomic_folder(folder) as temporary:
        save_tensors(model.state_dict(), temporary / WEIGHTS)
        if trained is not None:
            save_tensors(conv_tensors(trained), temporary / KERNELS)
        for name, text in texts.items():
            write_text(temporary / name, text)
        write_checksums(temporary)


def conv_tensors(model: CausalLM) -> dict[str, Tensor]:
    """Return the weights of the convolutions of all layers, by their names in the state dict of the model."""
    return {
        f"{conv_prefix(index)}{name}": tensor
        for index, block in enumerate(model.layers)
        for name, tensor in block.mixer.conv.state_dict().items()
    }


def conv_prefix(index: int) -> str:
    """Return how the names of the weights of a layer's convolution begin, in the state dict of a model."""
    return f"blocks.{index}.mixer.conv."


def save_report(folder: Path, report: ModelReport) -> None:
    """Update conversion.json of a converted model with later measurements, atomically."""
    write_text(folder / "conversion.json", report.to_json())


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of a newly created file.

    Args:
        tensors: Tensors by name.
        path: Output file.
        metadata: Additional entries of the file's metadata.

    Raises:
        OSError: If the disk is full, or on any other error of the operating system.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors creates files that only their owner may read
    try:
        save_file(contiguous, path, metadata={"format": "pt"} | (metadata or {}))
        path.chmod(mode)
    except SafetensorError as error:
        # safetensors reports errors of the operating system only in its message. A full disk becomes an
        # OSError, which the user can fix. Serialising to memory first would hold all weights twice.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def check_out_folder(folder: Path, force: bool) -> None:
    """Check that an output folder doesn't exist, or is a converted model and ``force`` is set.

    Raises:
        CheckpointError: If ``folder`` must not be written.
        UserError: If ``folder`` can't be created, for example because a parent is a file.
    """
    restore_replaced(folder)
    if not folder.exists():
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: is a broken symbolic link", "choose another --out")
        check_parents(folder)
        return
    if not force:
        raise CheckpointError(f"{folder}: already exists", "choose another --out, or replace it with --force")
    if not is_converted(folder):
        raise CheckpointError(
            f"{folder}: is not a converted model, --force won't replace it", "choose another --out"
        )


def check_unchanged(folder: Path, fingerprint: str) -> None:
    """Check that a converted model wasn't removed or replaced before files are added to its folder.

    Args:
        folder: Folder of the converted model.
        fingerprint: Expected fingerprint of the model.

    Raises:
        CheckpointError: If the folder is missing or contains another model.
    """
    try:
        found = read_json(folder / "config.json", "").get("model_sha256")
    except CheckpointError:
        found = None
    if found != fingerprint:
        raise CheckpointError(
            f"{folder}: was removed or replaced in the meantime, nothing was added to it", "convert again"
        )


def is_converted(folder: Path) -> bool:
    """Return whether ``folder`` has the files of a converted model."""
    return (folder / "conversion.json").is_file() and (folder / "config.json").is_file()


def load_converted(folder: Path) -> ConvertedModel:
    """Load a converted model on the CPU.

    If another process replaces the model during loading, the new one is loaded.

    Raises:
        CheckpointError: If a file is missing or damaged, or the files are inconsistent.
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
        # The folder was replaced during loading: load the new model.


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return device and inode of a folder, which differ after a replacement; None if it doesn't exist."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read(folder: Path) -> ConvertedModel:
    config = read_json(folder / "config.json", REMEDY)
    text = read_text(folder / "tokenizer.json", REMEDY)
    check_regular(folder / WEIGHTS, REMEDY)
    verified = verify_folder(folder, config)
    try:
        # save_pretrained of tnnlm.hf adds the prefix "model." to all names.
        tensors = {key.removeprefix(_PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}
        if config["format"] != FORMAT:
            raise CheckpointError(f"{folder}: has the format of another version of tnnlm", REMEDY)
        model_config = model_config_from_dict(config["model"], str(folder))
        eos_token, fingerprint = config["eos_token"], config["tokenizer_sha256"]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: is damaged ({one_line(error)})", REMEDY) from None
    tokenizer = TextTokenizer.from_json(text, eos_token, str(folder / "tokenizer.json"))
    tokenizer.chat_template = stored_template(folder)
    check_sizes(model_config, tensors, folder)
    check_finite(tensors, folder / WEIGHTS)
    # Build the model without its kernels: the code of a user-defined kernel need not be available here.
    convs = [RecurrentConv(_layer_params(tensors, index, folder)) for index in range(model_config.n_layers)]
    with without_weights():
        model = CausalLM(model_config, convs).eval().requires_grad_(False)
    load_weights(model, tensors, folder)
    check_tokenizer(tokenizer, model, folder)
    if tokenizer.fingerprint != fingerprint and tokenizer.ids_fingerprint != config.get(
        "tokenizer_ids_sha256"
    ):
        raise CheckpointError(
            f"{folder}: tokenizer.json is not the one this model was trained with",
            "convert again to another folder",
        )
    return ConvertedModel(model, tokenizer, _fingerprint(folder, model, config, verified))


def _fingerprint(folder: Path, model: CausalLM, config: dict[str, Any], verified: bool) -> str:
    """Return the hash of the weights that config.json states; without checksums it is compared with them.

    Raises:
        CheckpointError: If it differs.
    """
    stated = config.get("model_sha256")
    if verified and isinstance(stated, str):
        return stated
    found = model_fingerprint(model)
    if stated is not None and stated != found:
        raise CheckpointError(
            f"{folder / WEIGHTS}: is damaged or was replaced (config.json states another hash)", REMEDY
        )
    return found


def check_tokenizer(tokenizer: TextTokenizer, model: Backbone, where: Path) -> None:
    """Check that the tokenizer has no more tokens than the model's embedding has rows.

    Raises:
        CheckpointError: If the tokenizer is larger; the message contains both sizes.
    """
    if tokenizer.size > model.config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.size} tokens, the model only {model.config.vocab_size}"
        )


def _layer_params(tensors: dict[str, Tensor], index: int, folder: Path) -> Params:
    prefix = conv_prefix(index)
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    try:
        return recurrence.from_tensors(own)
    except KeyError as error:
        raise CheckpointError(f"{folder}: model.safetensors has no {error}", "convert again") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}: is damaged (layer {index}, {error})", "convert again") from None
