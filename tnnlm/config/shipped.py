"""Configurations that come with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from tnnlm.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")


def shipped_folder() -> Path:
    """Where they lie: in the package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """Such as ``demo`` or ``lra/listops``."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """A configuration by the path of its file, or by the name of one that is shipped.

    Raises:
        ConfigError: if it is no path and no such name is shipped.
    """
    path = Path(name)
    if path.suffix in _SUFFIXES or path.exists():
        return path
    if name in shipped_names():
        return shipped_folder() / f"{name}.yaml"
    raise ConfigError(
        f"--config {name}: no such file, and not a shipped configuration",
        f"there is {', '.join(shipped_names())}",
    )
