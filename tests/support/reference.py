"""Reference cases from other implementations: inputs, weights and outputs, in ``tests/reference``."""

from __future__ import annotations

from pathlib import Path

import safetensors
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "reference"


def reference(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a reference case by name, all float64, and its metadata.

    Args:
        name: Name of the case, which is that of its file without the suffix.

    Raises:
        FileNotFoundError: If there is no such case.
    """
    with safetensors.safe_open(FOLDER / f"{name}.safetensors", framework="pt") as case:
        tensors = {key: case.get_tensor(key) for key in case.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, dict(case.metadata() or {})
