"""Checksums of a converted folder (checksums.json), which are verified whenever the folder is loaded.

config.json says that they exist, so that a folder without them is known to be of an older version. The
tokenizer is not listed: config.json contains its hash, and Transformers rewrites tokenizer.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tnnlm.checksums import ALGORITHM, check_files, list_files, not_verified, warn_changed
from tnnlm.errors import CheckpointError
from tnnlm.files import write_text
from tnnlm.reading import read_json, read_text

CHECKSUMS = "checksums.json"
"""Name of the file, which is also the value of ``ENTRY``."""
ENTRY = "checksums"
"""Entry of config.json that says that there are checksums."""
WEIGHTS = "model.safetensors"
KERNELS = "kernels.safetensors"
"""Weights of the kernels, which only training needs; decoding doesn't read them."""
_CONFIG = "config.json"
EDITABLE = ("generation_config.json", "tokenizer_config.json")
"""Settings of Transformers, which its users edit: a difference is a warning."""
CODE = ("modeling_tnnlm.py", "standalone_tnnlm.py")
"""Code for Transformers, which is verified before it is published, because nothing else reads it here."""
REMEDY = "convert again"


def write_checksums(folder: Path) -> None:
    """Write the checksums of configuration, weights, code and ``EDITABLE`` files of a converted folder."""
    found = sorted({path.name for path in folder.glob("*.safetensors*")})
    names = [name for name in (_CONFIG, *EDITABLE, *CODE) if (folder / name).is_file()]
    content = {"algorithm": ALGORITHM, "files": list_files(folder, [*names, *found])}
    write_text(folder / CHECKSUMS, json.dumps(content, indent=2) + "\n")


def update_checksum(folder: Path, name: str) -> None:
    """Replace the checksum of one file in a folder that has checksums of its other files."""
    path = folder / CHECKSUMS
    files = _listed(path) if path.is_file() else {}
    content = {"algorithm": ALGORITHM, "files": {**files, **list_files(folder, [name])}}
    write_text(path, json.dumps(content, indent=2) + "\n")


def verify_folder(
    folder: Path, config: Mapping[str, Any], *, weights: bool = True, kernels: bool = False
) -> bool:
    """Verify the checksums of a converted folder.

    Args:
        folder: Folder of the converted model.
        config: Content of its config.json.
        weights: Whether to verify the weights as well, which reads them.
        kernels: Whether to verify the weights of the kernels as well.

    Returns:
        Whether checksums of the weights were verified. A folder of a version that wrote none has none, which
        is logged.

    Raises:
        CheckpointError: If a file is missing, damaged or was replaced.
    """
    path = folder / CHECKSUMS
    if not config.get(ENTRY) and not os.path.lexists(path):
        not_verified(folder)
        return False
    files = _listed(path)
    if _CONFIG not in files:
        raise CheckpointError(f"{path}: is damaged (it does not list {_CONFIG})", REMEDY)
    skipped = (*EDITABLE, *CODE) if kernels else (*EDITABLE, *CODE, KERNELS)
    read = [name for name in files if name == _CONFIG or (weights and name not in skipped)]
    check_files(folder, {name: files[name] for name in read}, REMEDY)
    return len(read) > 1


def verify_published(folder: Path, config: Mapping[str, Any], code: Mapping[str, str]) -> None:
    """Verify all files of a converted folder that have a checksum, but those that users edit, and its code.

    Args:
        folder: Folder of the converted model.
        config: Content of its config.json.
        code: Content of each file of ``CODE``, of which a folder without its checksum must have no other.

    Raises:
        CheckpointError: If a file is missing, damaged or was replaced, or if there are no checksums.
    """
    if not verify_folder(folder, config, kernels=True):
        raise CheckpointError(f"{folder}: has no checksums", REMEDY)
    files = _listed(folder / CHECKSUMS)
    check_files(folder, {name: files[name] for name in CODE if name in files}, REMEDY)
    for name in CODE:
        path = folder / name
        if name not in files and os.path.lexists(path) and read_text(path, REMEDY) != code.get(name):
            raise CheckpointError(f"{path}: is not code of this version, and has no checksum", REMEDY)


def _listed(path: Path) -> dict[str, Any]:
    """Return the entries of checksums.json by the name of a file in its folder."""
    files = read_json(path, REMEDY).get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise CheckpointError(f"{path}: is damaged (it lists no files)", REMEDY)
    return files


def warn_edited(folder: Path) -> None:
    """Log a warning for each file of ``EDITABLE`` that differs from its checksum, or was removed.

    Raises:
        CheckpointError: If it is not JSON any more.
    """
    path = folder / CHECKSUMS
    files = _listed(path) if path.is_file() else {}
    for name in files:
        if name in EDITABLE:
            try:
                check_files(folder, {name: files[name]}, "")
            except CheckpointError:
                if os.path.lexists(folder / name):  # Transformers needs none of them
                    read_json(folder / name, REMEDY)
                warn_changed(folder / name)
