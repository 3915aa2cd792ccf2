"""Configurations shipped with the package, which can be selected by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from tnnlm.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")


def shipped_folder() -> Path:
    """Return the folder of the configurations: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """Return the names of all shipped configurations, such as ``demo`` or ``lra/listops``."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the path of a configuration given by its path or by the name of a shipped configuration.

    Raises:
        ConfigError: If the name is neither a path nor a shipped configuration.
    """
    path, names = Path(name), shipped_names()
    if path.is_file():
        return path
    if name in names:
        return shipped_folder() / f"{name}.yaml"
    known = path.with_suffix("").as_posix() if path.suffix in _SUFFIXES else name
    near = difflib.get_close_matches(known, names, n=1, cutoff=0.75)
    if path.suffix in _SUFFIXES and not near and not path.exists():
        return path  # whose reader reports that it is missing
    what = "is a folder" if path.is_dir() else "no such file"
    raise ConfigError(
        f"--config {name}: {what}, and not a shipped configuration",
        f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}",
    )
