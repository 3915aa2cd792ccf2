"""A generation state on disk: recurrent states, next logits and random stream, as safetensors.

Continuing a loaded state equals never having stopped. The file names the model and the tokenizer it
belongs to by their hashes; under any other it is refused, since a state means nothing there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnnlm.checkpoints.converted import save_tensors
from tnnlm.errors import CheckpointError
from tnnlm.files import atomic_file, check_parents
from tnnlm.inference.generator import GenerationState, TextGenerator

FORMAT = "tnnlm-state-1"


class SavedState(NamedTuple):
    """What a file holds."""

    state: GenerationState
    random: Tensor | None
    """state of the random stream, for :meth:`torch.Generator.set_state`"""


def check_state_path(path: Path) -> None:
    """Refuse a place where no file can be written, before the text is generated.

    Raises:
        CheckpointError: naming it.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder", "give the name of a file")
    check_parents(path)


def save_state(
    path: Path, generator: TextGenerator, state: GenerationState, random: torch.Generator | None = None
) -> None:
    """Write a generation state; the file appears whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        generator: the model and tokenizer that it belongs to.
        state: of one or several sequences.
        random: the stream that goes on with it, if it matters.

    Raises:
        OSError: if the disk is full.
    """
    tensors = {
        f"layers.{index}.{name}": part
        for index, layer in enumerate(state.model_state.layers)
        for name, part in layer._asdict().items()
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
    with atomic_file(path) as temporary:
        save_tensors(tensors, temporary, metadata)


def load_state(path: Path, generator: TextGenerator) -> SavedState:
    """Load a generation state, onto the model's device.

    Raises:
        CheckpointError: if it is missing, damaged, or of another model or tokenizer.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise CheckpointError(f"{path}: is not a saved state, or damaged") from None
    if metadata.get("kind") != FORMAT:
        raise CheckpointError(f"{path}: is not a saved state of this project's generate.py")
    expected = {"model": generator.fingerprint, "tokenizer": generator.tokenizer.fingerprint}
    for part, fingerprint in expected.items():
        if metadata.get(part) != fingerprint:
            raise CheckpointError(
                f"{path}: was saved with another {part}", "load it with the one that wrote it"
            )
    random = tensors.pop("random", None)
    lengths = tuple(json.loads(metadata["lengths"]))
    empty = generator.model.init_state(len(lengths))
    device = generator.device
    layers = tuple(
        type(layer)(*(tensors[f"layers.{index}.{name}"].to(device) for name in layer._fields))
        for index, layer in enumerate(empty.layers)
    )
    state = GenerationState(type(empty)(layers), tensors["logits"].to(device), lengths, 0.0)
    return SavedState(state, random)
