"""Loggers, callbacks and the profiler that the settings name by their classes.

The classes are imported, and their arguments compared with those of the constructor, before anything is
written. Classes that a run or a checkpoint names are refused: they are code that a stranger chose.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning_utilities.core.rank_zero import rank_zero_only

from tnnlm.config.components import ForeignComponent
from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError, one_line
from tnnlm.fields import Component

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
"""Profilers of Lightning by the name that its Trainer knows."""
LOGGERS, PROFILE = "loggers", "profile"
"""Folders inside a run that loggers of the user and profilers write to."""


class _Part(NamedTuple):
    """Component with the setting that names it."""

    setting: str
    component: Component
    base: type
    """Class that it must be derived from."""

    @property
    def shown(self) -> str:
        """Setting and class, for errors."""
        return f"{self.setting}: {self.component['class_path']}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for the constructor."""
        return dict(self.component.get("init_args", {}))


def check_components(config: Config) -> None:
    """Check the classes that the settings name, without an instance of them.

    Raises:
        ConfigError: If a class comes from a run or a checkpoint, is missing, is of another kind, or doesn't
            take the arguments.
    """
    parts = list(_parts(config))
    foreign = [part for part in parts if isinstance(part.component, ForeignComponent) and not _is_known(part)]
    if foreign:
        settings = dict.fromkeys(part.setting for part in foreign)
        without = " ".join(f"{name}={'null' if name.endswith('profiler') else '[]'}" for name in settings)
        named = ", ".join(f"{part.setting}={part.component['class_path']}" for part in foreign)
        raise ConfigError(
            f"{named}: is code that the run names, not you",
            f"add --trust-code to run it, or omit it with {without}",
        )
    for part in parts:
        _check_arguments(part, _class_of(part), _defaults(part, Path()))


def named_callbacks(config: Config) -> list[Callback]:
    """Return the callbacks of ``trainer.callbacks``.

    Raises:
        ConfigError: If one can't be made.
    """
    return [_made(part, {}) for part in _parts(config) if part.base is Callback]


def named_loggers(config: Config, folder: Path) -> list[Logger]:
    """Return the loggers of ``trainer.loggers``.

    Args:
        config: The full configuration.
        folder: Folder of the run, for loggers that take a ``save_dir``.

    Raises:
        ConfigError: If one can't be made.
    """
    return [_made(part, _defaults(part, folder)) for part in _parts(config) if part.base is Logger]


def named_profiler(config: Config, folder: Path) -> Profiler | None:
    """Return the profiler of ``trainer.profiler``, which writes into the folder of the run.

    Only the first rank profiles.

    Raises:
        ConfigError: If it can't be made.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return None
    found = [_made(part, _defaults(part, folder)) for part in _parts(config) if part.base is Profiler]
    return found[0] if found else None


def _parts(config: Config) -> Iterator[_Part]:
    settings = config.trainer
    for name, base, components in (
        ("loggers", Logger, settings.loggers),
        ("callbacks", Callback, settings.callbacks),
        ("profiler", Profiler, [settings.profiler] if settings.profiler else []),
    ):
        for component in components:
            yield _Part(f"trainer.{name}", component, base)


def _is_known(part: _Part) -> bool:
    """Return whether a part is a profiler of Lightning by its name, without arguments."""
    return part.base is Profiler and part.component["class_path"] in PROFILERS and not part.arguments


def _class_of(part: _Part) -> type:
    """Import the class of a part.

    Raises:
        ConfigError: If it can't be imported, or is of another kind.
    """
    path = part.component["class_path"]
    if part.base is Profiler and path in PROFILERS:
        return PROFILERS[path]
    module, _, name = path.rpartition(".")
    if not module:
        known = f", or one of {', '.join(PROFILERS)}" if part.base is Profiler else ""
        raise ConfigError(f"{part.shown}: is no class path", f"write it as package.module.{path}{known}")
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(
            f"{part.shown}: can't be imported ({one_line(error)})",
            "install its package, or add its folder to PYTHONPATH",
        ) from error
    if not isinstance(found, type):
        raise ConfigError(f"{part.shown}: {module} has no class {name}")
    if not issubclass(found, part.base):
        raise ConfigError(f"{part.shown}: is not a {part.base.__name__} of lightning.pytorch")
    if issubclass(found, ProgressBar):
        raise ConfigError(f"{part.shown}: is a progress bar, and every run has one already", "omit it")
    if inspect.isabstract(found):
        raise ConfigError(f"{part.shown}: is abstract", "name a class derived from it")
    return found


def _defaults(part: _Part, folder: Path) -> dict[str, Any]:
    """Return the arguments that place the files of a logger or profiler inside the folder of the run."""
    places: dict[type, dict[str, str]] = {
        Logger: {"save_dir": str(folder / LOGGERS)},
        Profiler: {"dirpath": str(folder / PROFILE), "filename": "steps"},
    }
    names = places.get(part.base, {})
    accepted = inspect.signature(_class_of(part)).parameters
    return {name: value for name, value in names.items() if name in accepted and name not in part.arguments}


def _check_arguments(part: _Part, found: type, defaults: dict[str, Any]) -> None:
    try:
        inspect.signature(found).bind(**part.arguments, **defaults)
    except TypeError as error:
        raise ConfigError(f"{part.shown}: {error}", f"set its arguments in {part.setting}") from None


def _made(part: _Part, defaults: dict[str, Any]) -> Any:
    """Return an instance of a part."""
    try:
        return _class_of(part)(**part.arguments, **defaults)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a constructor may raise anything
        raise ConfigError(f"{part.shown}: can't be made ({one_line(error)})") from error
