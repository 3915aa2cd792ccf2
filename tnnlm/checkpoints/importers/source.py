"""Weights of a checkpoint of another implementation, read without running code that it may carry.

A pickled file may contain tensors, plain data and ``argparse.Namespace``, in which fairseq stores its
options; any other class or function that it names is refused by its name and not called.
"""

from __future__ import annotations

import argparse
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tnnlm.checkpoints.archive import archive_fault
from tnnlm.errors import CheckpointError
from tnnlm.reading import ANOTHER, check_regular, unreadable

CONTAINERS = ("model", "state_dict", "module")
"""Keys under which training frameworks store the weights: fairseq, Lightning and DeepSpeed."""
NESTED = 3
"""Maximum number of containers around the weights; a container may contain itself."""
_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+)")
"""Name of the class or function that torch.load refused, in its error message."""
_ALLOWING = threading.Lock()
"""Held while argparse.Namespace may be read: the list of permitted classes belongs to the process, so a
thread that leaves would withdraw the permission from one that still reads."""


class Source(NamedTuple):
    """Contents of a file of weights."""

    path: Path
    weights: dict[str, Tensor]
    """Tensors by key, on the CPU."""
    others: frozenset[str] = frozenset()
    """Keys of the same container whose values are not tensors."""


def read_weights(path: Path) -> Source:
    """Return the weights of a file by key, on the CPU.

    Args:
        path: File of ``torch.save`` or of safetensors, recognised by the suffix ``.safetensors``.

    Raises:
        CheckpointError: If the file is missing, truncated, carries code, or holds no weights; or if a weight
            is not finite.
    """
    check_regular(path, "give a file of weights", missing="no such file")
    data = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    found = _weights_in(data)
    weights = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(
            f"{path}: holds no weights", f"give a file of weights by name, or with them under {CONTAINERS[0]}"
        )
    for key, tensor in weights.items():
        _check_tensor(key, tensor, path)
    return Source(path, weights, frozenset(found) - {*weights})


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        reason = f"{path}: is not a safetensors file, or truncated ({error})"
        raise CheckpointError(reason, ANOTHER) from None
    except OSError as problem:
        raise unreadable(path, problem, ANOTHER, CheckpointError) from None


def _read_pickle(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path) and archive_fault(path) is not None:
            raise zipfile.BadZipFile  # torch.load verifies no checksums
        with _ALLOWING, torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the version of the pickle, which fails below if not read
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many types for damaged and foreign files
        found = _GLOBAL.search(str(error)) if isinstance(error, UnpicklingError) else None
        if found is None:
            reason = f"{path}: is not a checkpoint, or truncated or damaged"
            raise CheckpointError(reason, ANOTHER) from None
        raise CheckpointError(
            f"{path}: contains {found[1]}, which is neither a tensor nor plain data and was not loaded",
            "save the weights alone, as safetensors, where the checkpoint is trusted",
        ) from None


def _check_tensor(key: str, tensor: Tensor, path: Path) -> None:
    """Raise an error for a tensor that can't be a weight, or whose key would not fit in a message."""
    if not key.isprintable():
        raise CheckpointError(f"{path}: the key {key!r} is not printable", ANOTHER)
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not dense or tensor.is_complex():
        raise CheckpointError(f"{path}: {key} is not a dense tensor of real numbers")
    # A tensor may claim any shape by strides of zero, and then need more memory than the machine has.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {key} has a larger shape than its storage", ANOTHER)
    if not torch.isfinite(tensor.float()).all():
        raise CheckpointError(f"{path}: {key} is not finite", ANOTHER)


def _weights_in(data: Any) -> dict[str, Any]:
    """Return the contents of the innermost container of a checkpoint, by key."""
    for _ in range(NESTED):
        inner = next((data[name] for name in CONTAINERS if isinstance(data, Mapping) and name in data), None)
        if isinstance(inner, Mapping):
            data = inner
    if not isinstance(data, Mapping):
        return {}
    return {key: value for key, value in data.items() if isinstance(key, str)}
