"""Sharded checkpoints: an index file, such as last.ckpt, and a folder of safetensors files with the tensors.

The index is a checkpoint without its large tensors, in the format of the single file, with an additional
entry ``shards``: the folder, the size and checksum of its files, the shape of each tensor, and the names of
the parameters in module order. A file holds the shards of one rank, and their offsets in its metadata, as
``torch.distributed.checkpoint`` writes them in the safetensors format. Neither kind of file runs code when
it is read. This module must not import training code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnnlm.checksums import check_files
from tnnlm.errors import CheckpointError
from tnnlm.reading import ANOTHER

SHARDS = "shards"
"""Key of the description of the shards in an index file."""
SUFFIX = ".shards"
"""End of the name of a folder of shards."""
_WEIGHT = "state_dict."
_OFFSETS = "DCP_SHARDING_INFO"
"""Key of the offsets in the metadata of a safetensors file, fixed by torch.distributed.checkpoint."""


Place: TypeAlias = tuple[slice, ...]
"""Numbers of a tensor that a shard holds."""


class Shards(NamedTuple):
    """Description of the shards in an index file."""

    folder: Path
    """Folder of the shards, next to the index."""
    files: dict[str, list[Any]]
    """Size in bytes and checksum of each file, by its name."""
    shapes: dict[str, list[int]]
    """Shape of each tensor, by its name; see :func:`weight_name` and :func:`moment_name`."""
    parameters: list[str]
    """Names of the parameters in the order of ``LightningModule.parameters()``, which numbers them."""

    def entry(self) -> dict[str, Any]:
        """Return the description as plain data."""
        return {**self._asdict(), "folder": self.folder.name}


def weight_name(key: str) -> str:
    """Return the name in the shards of the tensor ``key`` of ``state_dict``."""
    return _WEIGHT + key


def moment_name(optimizer: int, parameter: str, moment: str) -> str:
    """Return the name in the shards of an optimizer's tensor for a parameter, such as ``exp_avg``."""
    return f"optimizer_states.{optimizer}.{parameter}.{moment}"


def shards_of(path: Path, data: Mapping[str, Any], *, verify: bool = False) -> Shards | None:
    """Return the description of the shards of a checkpoint; None if it is a single file.

    Args:
        path: Checkpoint, which is the index file if it is sharded.
        data: Content of ``path``.
        verify: Whether to compare the checksums of the shards, which reads them.

    Raises:
        CheckpointError: If the description is invalid, a shard is missing, truncated or corrupt, or the
            folder contains other shards.
    """
    if SHARDS not in data:
        return None
    try:
        shards = _parsed(path, data[SHARDS])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path}: is corrupt", ANOTHER) from None
    check_files(shards.folder, shards.files, ANOTHER, contents=verify)
    # torch.distributed.checkpoint reads every file in the folder.
    for file in sorted(shards.folder.glob("*.safetensors")):
        if file.name not in shards.files:
            raise CheckpointError(f"{path}: has no shard {file}", "move this file to another folder")
    return shards


def load_model_weights(path: Path, data: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the unsharded ``state_dict`` of a checkpoint of either kind.

    Raises:
        CheckpointError: If a shard is missing or corrupt.
    """
    weights: dict[str, Tensor] = dict(data["state_dict"])
    shards = shards_of(path, data)
    if shards is not None:
        found = _read_tensors(path, shards, _WEIGHT)
        weights |= {name.removeprefix(_WEIGHT): tensor for name, tensor in found.items()}
    return weights


def assemble(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of either kind as the content of a single file, with all tensors unsharded.

    Raises:
        CheckpointError: If a shard is missing or corrupt.
    """
    shards = shards_of(path, data)
    if shards is None:
        return data
    number = {name: index for index, name in enumerate(shards.parameters)}
    states = []
    for index, saved in enumerate(data["optimizer_states"]):
        if not all(name in number for group in saved["param_groups"] for name in group["params"]):
            raise CheckpointError(f"{path}: is corrupt", ANOTHER)
        prefix = moment_name(index, "", "").removesuffix(".")
        state = {name: dict(values) for name, values in saved["state"].items()}
        for name, tensor in _read_tensors(path, shards, prefix).items():
            parameter, _, moment = name.removeprefix(prefix).rpartition(".")
            state.setdefault(parameter, {})[moment] = tensor
        groups = [
            {**group, "params": [number[name] for name in group["params"]]} for group in saved["param_groups"]
        ]
        numbered = {number[name]: values for name, values in state.items()}
        states.append({"state": dict(sorted(numbered.items())), "param_groups": groups})
    rest = {key: value for key, value in data.items() if key != SHARDS}
    return {**rest, "state_dict": load_model_weights(path, data), "optimizer_states": states}


def _parsed(path: Path, entry: Mapping[str, Any]) -> Shards:
    """Return the description in an index; ValueError if a name leads out of the folder of the index."""
    names = [entry["folder"], *entry["files"]]
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError
    if not entry["folder"].endswith(SUFFIX):  # ".." passes the check of names
        raise ValueError
    files = {name: [int(size), str(digest)] for name, (size, digest) in entry["files"].items()}
    shapes = {str(name): [int(size) for size in shape] for name, shape in entry["shapes"].items()}
    return Shards(path.parent / entry["folder"], files, shapes, [str(name) for name in entry["parameters"]])


def _read_tensors(path: Path, shards: Shards, prefix: str) -> dict[str, Tensor]:
    """Return the unsharded tensors whose names begin with ``prefix``.

    Raises:
        CheckpointError: If a shard isn't readable, two of them hold the same numbers of a tensor, or they
            don't cover a tensor.
    """
    full: dict[str, Tensor] = {}
    filled: dict[str, list[Place]] = {}
    missing = {
        name: torch.Size(shape).numel() for name, shape in shards.shapes.items() if name.startswith(prefix)
    }
    try:
        for file in shards.files:
            for name, offset, part in _parts(shards.folder / file, prefix):
                if name not in full:
                    full[name] = torch.zeros(shards.shapes[name], dtype=part.dtype)
                place = _place(offset, part, filled.setdefault(name, []))
                full[name][place] = part
                missing[name] -= part.numel()
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{path}: its shard {shards.folder / file} is corrupt", ANOTHER) from None
    if any(missing.values()):
        raise CheckpointError(f"{path}: its shards in {shards.folder} are incomplete", ANOTHER)
    return full


def _place(offset: list[int], part: Tensor, filled: list[Place]) -> Place:
    """Return where a part belongs in its tensor, and add it to ``filled``.

    Raises:
        ValueError: If that isn't in the tensor, or belongs to another part, as if a file were there twice.
    """
    place = tuple(slice(a, a + n) for a, n in zip(offset, part.shape, strict=True))
    if min(offset) < 0:
        raise ValueError
    if part.numel():
        apart = (
            any(a.stop <= b.start or b.stop <= a.start for a, b in zip(place, one, strict=True))
            for one in filled
        )
        if not all(apart):
            raise ValueError
        filled.append(place)
    return place


def _parts(file: Path, prefix: str) -> Iterator[tuple[str, list[int], Tensor]]:
    """Yield the name, offset and values of each shard in a file whose name begins with ``prefix``."""
    with safe_open(file, framework="pt") as opened:
        offsets = json.loads(opened.metadata()[_OFFSETS])
        for name in opened.keys():  # noqa: SIM118  it is no dict
            if name.startswith(prefix):
                yield name, offsets[name]["saved_offsets"], opened.get_tensor(name)
