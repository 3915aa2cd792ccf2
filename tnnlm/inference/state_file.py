"""Saving and loading of generation states: recurrent states, next logits and random state, as safetensors.

A loaded state continues exactly as if generation had not been interrupted. The file contains the hashes of
its model and tokenizer, and loading it with any other raises an error; and a checksum of all its contents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnnlm.checkpoints.converted import save_tensors
from tnnlm.checksums import checksum, not_verified
from tnnlm.errors import CheckpointError
from tnnlm.files import atomic_file
from tnnlm.inference.generator import GenerationState, TextGenerator
from tnnlm.ops.recurrence import check_state, named_tensors, with_tensors
from tnnlm.reading import ANOTHER, check_regular

FORMAT = "tnnlm-state-2"
FORMER = "tnnlm-state-1"
"""Format of versions that wrote no checksum."""


class SavedState(NamedTuple):
    """Contents of a saved state."""

    state: GenerationState
    random: Tensor | None
    """State of the random number generator for :meth:`torch.Generator.set_state`, if it was saved."""


def save_state(
    path: Path, generator: TextGenerator, state: GenerationState, random: torch.Generator | None = None
) -> None:
    """Write a generation state to a file atomically.

    Args:
        path: Path of the file; an existing file is replaced.
        generator: Text generator with the model and tokenizer of the state.
        state: State of one or several sequences.
        random: Random number generator to save with the state; None saves none.

    Raises:
        OSError: If the file can't be written, for example on a full disk.
    """
    tensors = {
        f"layers.{index}.{name}": part
        for index, layer in enumerate(state.model_state.layers)
        for name, part in named_tensors(layer).items()
    }
    tensors["logits"] = state.logits
    if random is not None:
        tensors["random"] = random.get_state()
    metadata = {
        "kind": FORMAT,
        "model": generator.fingerprint,
        "tokenizer": generator.tokenizer.fingerprint,
        "lengths": json.dumps(state.lengths),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    with atomic_file(path) as temporary:
        save_tensors(tensors, temporary, metadata)


def load_state(path: Path, generator: TextGenerator) -> SavedState:
    """Load a generation state onto the model's device.

    Raises:
        CheckpointError: If the file is missing or corrupt, or belongs to another model or tokenizer.
    """
    check_regular(path, "give a file of --save-state", missing="no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise CheckpointError(f"{path}: is not a saved state, or is corrupt", ANOTHER) from None
    if metadata.get("kind") not in (FORMAT, FORMER):
        raise CheckpointError(f"{path}: is not a saved state of this version of generate.py", ANOTHER)
    if metadata["kind"] == FORMER:
        not_verified(path)
    elif metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise CheckpointError(f"{path}: is damaged (its checksum differs)", "save it again")
    expected = {"model": generator.fingerprint, "tokenizer": generator.tokenizer.fingerprint}
    for part, fingerprint in expected.items():
        if metadata.get(part) != fingerprint:
            raise CheckpointError(
                f"{path}: was saved with another {part}", "load it with the one that it was saved with"
            )
    random = tensors.pop("random", None)
    try:
        lengths = _lengths(metadata.get("lengths", ""))
        state = _state(tensors, lengths, generator)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})", "save it again") from None
    return SavedState(state, random)


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the checksum of the contents of a file, whose metadata has all entries but this one."""
    found = [json.dumps({key: metadata[key] for key in sorted(metadata) if key != "format"})]
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(data.data)}")
    return checksum("\n".join(found).encode())


def _lengths(text: str) -> tuple[int, ...]:
    """Return the numbers of tokens of the sequences.

    Raises:
        ValueError: If the text is no JSON list of such numbers, at least one.
    """
    lengths = json.loads(text)
    if not lengths or not isinstance(lengths, list) or any(type(n) is not int or n < 0 for n in lengths):
        raise ValueError("its lengths are not numbers of tokens")
    return tuple(lengths)


def _state(tensors: dict[str, Tensor], lengths: tuple[int, ...], generator: TextGenerator) -> GenerationState:
    """Return the state from its tensors.

    Raises:
        ValueError: If a tensor is missing, unknown, or not of the shape and dtype of the model; or if
            no sequence leads to its numbers.
    """
    single = generator.model.init_state(1)
    expected = {
        f"layers.{index}.{name}": part
        for index, layer in enumerate(single.layers)
        for name, part in named_tensors(layer).items()
    }
    for name in sorted({*expected, "logits"} ^ {*tensors}):
        raise ValueError(f"{name} is {'no part of the state' if name in tensors else 'missing'}")
    for name, part in expected.items():
        shape = (len(lengths), *part.shape[1:])
        if tensors[name].shape != shape or tensors[name].dtype != part.dtype:
            raise ValueError(f"{name} is not of the shape and dtype of the model")
    logits = tensors["logits"]
    if logits.dim() != 2 or len(logits) != len(lengths) or logits.shape[1] < generator.tokenizer.size:
        raise ValueError("logits is not of the shape of the model")
    if not logits.is_floating_point():
        raise ValueError("logits is not of a floating-point dtype")
    device = generator.device
    layers = tuple(
        with_tensors(layer, (tensors[f"layers.{index}.{name}"].to(device) for name in named_tensors(layer)))
        for index, layer in enumerate(single.layers)
    )
    for layer in layers:
        check_state(layer)
    return GenerationState(type(single)(layers), logits.to(device), lengths, 0.0)
