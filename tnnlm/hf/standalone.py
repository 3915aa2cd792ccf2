"""Definitions that replace others of the package in ``standalone_tnnlm.py`` of a converted folder.

:mod:`tnnlm.checkpoints.bundle` writes that file, which Transformers imports where tnnlm is not installed. The
definitions here need nothing but PyTorch. Each has the name, and the meaning, of the definition that it
replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tnnlm.checkpoints.hf_files import SHIM, SHIM_TEXT, STANDALONE
from tnnlm.errors import CheckpointError
from tnnlm.ops.toeplitz import convolve, fft_length

CHECKSUMS = None
"""Entry of config.json: what is saved here has no checksums but that of the weights."""


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of a model, as a trained one had them; a kernel is not among them."""

    d_model: int
    n_layers: int
    vocab_size: int
    block: str = "tnn"
    expand: int = 3
    glu_dim: int | None = None
    final_norm: str = "simple_rms"
    embed_scale: bool = False
    dropout: float = 0.0
    causal: bool | None = None


def model_config_from_dict(data: dict[str, Any], where: str) -> ModelConfig:
    """Return the sizes in the entry ``model`` of config.json.

    Raises:
        CheckpointError: If one is missing or has another type.
    """
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    try:
        sizes = ModelConfig(**{name: data[name] for name in names if name in data})
    except TypeError as error:
        raise CheckpointError(f"{where}: is damaged ({error})", "download it again") from None
    numbers = (sizes.d_model, sizes.n_layers, sizes.vocab_size, sizes.expand, sizes.glu_dim or 1)
    if any(type(number) is not int or number < 1 for number in numbers):
        raise CheckpointError(f"{where}: is damaged (a size is not a number from 1)", "download it again")
    return sizes


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return nothing, because :func:`verify_folder` reads nothing."""
    return {}


def verify_folder(folder: Path, config: Mapping[str, Any], *, weights: bool = True) -> bool:
    """Return that no file was verified: the weights are compared with their SHA-256 after loading."""
    return False


def warn_edited(folder: Path) -> None:
    """Do nothing, because there are no checksums to compare with."""


def write_checksums(folder: Path) -> None:
    """Remove checksums of earlier files; config.json has the SHA-256 of the weights."""
    (folder / "checksums.json").unlink(missing_ok=True)


def update_checksum(folder: Path, name: str) -> None:
    """Remove checksums of earlier files."""
    write_checksums(folder)


def write_text(path: Path, text: str) -> None:
    """Create or replace a file of text in UTF-8."""
    path.write_text(text, encoding="utf-8", newline="\n")


def code_files() -> dict[str, str]:
    """Return this file and the one that imports it, by file name."""
    return {SHIM: SHIM_TEXT, STANDALONE: Path(__file__).read_text(encoding="utf-8")}


def switched_off() -> frozenset[str]:
    """Return the operators that are switched off, of which there are none."""
    return frozenset()


def toeplitz(x: Tensor, k: Tensor) -> Tensor:
    """Convolve each channel of x (B, L, E) causally with its taps k (E, K) by FFT, without gradients."""
    k = k[:, : x.shape[1]]
    y = convolve(x.permute(2, 0, 1), k, fft_length(x.shape[1] + k.shape[1] - 1))[0]
    return y.permute(1, 2, 0)
