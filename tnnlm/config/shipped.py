"""Configurations shipped with the package, which can be selected by name."""

from __future__ import annotations

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
    path = Path(name)
    if path.suffix in _SUFFIXES or path.exists():
        return path
    if name in shipped_names():
        return shipped_folder() / f"{name}.yaml"
    raise ConfigError(
        f"--config {name}: no such file, and not a shipped configuration",
        f"choose one of {', '.join(shipped_names())}",
    )
