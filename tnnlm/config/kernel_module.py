"""Import of the Python module that registers a custom kernel, if it may run.

Code runs if the user named it, on the command line or in a file given with ``--config``, or allowed it. The
configuration of a run, a checkpoint or a converted model may come from a stranger: the module that it names
runs if the user runs the same code in its place, by its hash, or if a record says that this user ran it here
before. What is hashed is what is executed: the source is read once, and no bytecode next to it is used.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

from tnnlm.config.values import one_line
from tnnlm.errors import ConfigError
from tnnlm.trust import Trust, remember, remembered

_KIND = "kernel module"
"""Kind of the records."""
_HASH = 12
"""Digits of a hash in messages."""
_EXECUTED: dict[str, str] = {}
"""SHA-256 of the source that this process executed last, by place."""


class Named(NamedTuple):
    """Kernel module as named by a configuration."""

    module: str
    """Path of a file that ends in ``.py``, or name of a module."""
    own: bool
    """Whether the user named it, and not a file that came with a model."""
    sha256: str | None
    """SHA-256 of the source, as recorded; None if it isn't recorded."""
    place: str
    """Line or file that names it, for errors."""


class _Source(NamedTuple):
    """Source of a module, as read."""

    spec: ModuleSpec
    """Place of the source, and the name under which the module is registered in ``sys.modules``."""
    text: bytes
    sha256: str


def run_kernel_module(named: Named, trust: Trust) -> Named:
    """Execute a kernel module if it may run and this process hasn't executed it yet.

    Returns:
        The module that was run, which is ``trust.module`` if the user named one in place of a stranger's,
        with the hash of its source.

    Raises:
        ConfigError: If it may not run, has another hash than recorded, or can't be imported.
    """
    if not named.own and trust.module is not None:
        named = named._replace(module=trust.module, own=True)
    key = str(Path(named.module).resolve()) if named.module.endswith(".py") else named.module
    if not (named.own or trust.code or _ran_before(key, named.sha256)):
        raise ConfigError(
            f"model.kernel.module={one_line(named.module)}: is code that was not run here before "
            f"({named.place})",
            "name the file yourself with --kernel-module (train: model.kernel.module=FILE), "
            "or add --trust-code",
        )
    try:
        source = _read(named.module, key)
        if named.sha256 in (None, source.sha256) or trust.code:
            imported = named.module in sys.modules  # by the user's own program
            if _EXECUTED.get(key) != source.sha256 and not imported:
                _execute(source)
                _EXECUTED[key] = source.sha256
            remember(_KIND, module=key, sha256=source.sha256)
            return named._replace(sha256=source.sha256)
    except (Exception, SystemExit) as error:  # The user's file may raise anything.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(
            f"model.kernel.module={one_line(named.module)}: can't be imported ({reason})"
        ) from error
    raise ConfigError(
        f"model.kernel.module={one_line(named.module)}: has the SHA-256 {source.sha256[:_HASH]}..., but "
        f"{one_line(named.sha256)[:_HASH]}... is recorded ({named.place})",
        "restore the file, or add --trust-code",
    )


def _ran_before(key: str, sha256: str | None) -> bool:
    """Return whether this user ran the module with this hash, in this process or on this machine."""
    if sha256 is None:
        return False
    return _EXECUTED.get(key) == sha256 or remembered(_KIND, module=key, sha256=sha256)


def _read(module: str, key: str) -> _Source:
    """Read a module without executing any of it.

    Raises:
        Exception: If it is not found or can't be read.
    """
    if module.endswith(".py"):
        # A file is in no package, also if its name has a dot; the name could be that of another module.
        stem = Path(key).stem.replace(".", "_")
        name = f"tnnlm_kernel_{stem}_{hashlib.sha256(key.encode()).hexdigest()[:_HASH]}"
        spec = spec_from_file_location(name, key)
    else:
        spec = _find(module)
    if spec is None or spec.origin is None or not spec.has_location:
        raise ModuleNotFoundError(f"No module named {module!r} with a Python source")
    text = Path(spec.origin).read_bytes()
    return _Source(spec, text, hashlib.sha256(text).hexdigest())


def _find(module: str) -> ModuleSpec | None:
    """Find a module by its name; ``importlib.util.find_spec`` would execute its packages."""
    places: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        found = (finder.find_spec(name, places) for finder in sys.meta_path)
        spec = next((one for one in found if one is not None), None)
        if spec is None:
            return None
        places = spec.submodule_search_locations or []
    return spec


def _execute(source: _Source) -> None:
    """Execute the source that was read, as a module.

    Raises:
        Exception: Whatever the code raises; the module is then not registered.
    """
    parent, _, leaf = source.spec.name.rpartition(".")
    if parent:
        import_module(parent)
    loaded = module_from_spec(source.spec)
    # Registered before it is executed, because dataclasses look up their module.
    sys.modules[source.spec.name] = loaded
    try:
        exec(compile(source.text, str(source.spec.origin), "exec"), loaded.__dict__)
    except BaseException:
        del sys.modules[source.spec.name]
        raise
    if parent:
        setattr(sys.modules[parent], leaf, loaded)
