"""Every setting with its type, default and description, for ``--help``, the reference pages and the schema.

All of it comes from the fields of the settings dataclasses and their docstrings, which also decide what
:mod:`tnnlm.config.loader` accepts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from tnnlm.config.flags import field_docs
from tnnlm.config.layers import KERNEL
from tnnlm.config.schema import Config
from tnnlm.config.values import is_list, item_type, kinds_of
from tnnlm.fields import Component
from tnnlm.kernels import KERNEL_SCHEMAS, KernelConfig

WORDS: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    Component: "class",
}
"""Types of values in words."""
ITEM = "[]."
"""End of the prefix of settings that every item of a list has."""
_ROLE = re.compile(r":\w+:`~?([^`]*)`")
_SENTENCE = re.compile(r"(?<=\.)\s+")


class Entry(NamedTuple):
    """One setting."""

    key: str
    """Full key, such as ``optim.lr``."""
    hint: Any
    """Type of the field."""
    metadata: Mapping[str, Any]
    """Bounds and choices, created by :mod:`tnnlm.fields`."""
    default: Any
    """Default value, or ``dataclasses.MISSING`` if the setting must be set."""
    text: str
    """Description in Markdown."""

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def sentence(self) -> str:
        """First sentence of the description, without Markdown."""
        return _SENTENCE.split(self.text.replace("`", ""), maxsplit=1)[0]

    @property
    def options(self) -> tuple[str, ...]:
        """Values that may be chosen; empty if the setting is free."""
        return tuple(self.metadata.get("options") or ())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Types of the value in words, such as ``integer``, without null; a keyword is given by itself."""
        if is_list(self.hint):
            (item,) = get_args(next(kind for kind in kinds_of(self.hint) if get_origin(kind) is list))
            words = {kind: f"{word}s" for kind, word in WORDS.items()} | {Component: "classes"}
            plural = words.get(item, "groups")
            return (f"list of {plural}",)
        word = self.metadata.get("word")
        found = [kind for kind in kinds_of(self.hint) if kind is not NoneType and not (kind is str and word)]
        return tuple(WORDS.get(kind, str(kind)) for kind in found)


class Group(NamedTuple):
    """Settings that stand together under one heading."""

    prefix: str
    """Key of the group with a dot at its end; empty for the settings at the top."""
    kernel: str | None
    """Name of the kernel that has these settings; None if they don't depend on the kernel."""
    about: str
    """First sentence about the group."""
    entries: tuple[Entry, ...]

    @property
    def of_items(self) -> bool:
        """Whether these are the settings of the items of a list, such as ``data.sources[].weight``."""
        return self.prefix.endswith(ITEM)


def entries_of(owner: type, prefix: str) -> tuple[Entry, ...]:
    """Return the settings of a dataclass, without those of the groups inside it.

    Args:
        owner: Settings dataclass.
        prefix: Key of the group, with a dot at its end if it isn't empty.
    """
    hints, documented = get_type_hints(owner), field_docs(owner)
    return tuple(
        Entry(
            f"{prefix}{item.name}",
            hints[item.name],
            item.metadata,
            item.default if item.default_factory is MISSING else item.default_factory(),
            _ROLE.sub(r"`\1`", documented.get(item.name, "")).replace("``", "`"),
        )
        for item in fields(owner)
        if not is_dataclass(hints[item.name])
    )


def groups() -> Iterator[Group]:
    """Yield all groups of settings in the order of the configuration, with those of every kernel."""
    yield from _groups(Config, "")


def _groups(owner: type, prefix: str) -> Iterator[Group]:
    if f"{KERNEL}." == prefix:
        yield from _kernel_groups(prefix)
        return
    yield Group(prefix, None, _about(owner), entries_of(owner, prefix))
    for name, hint in get_type_hints(owner).items():
        item = item_type(hint)
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _groups(hint, f"{prefix}{name}.")
        elif is_dataclass(item):
            assert isinstance(item, type)
            yield from _groups(item, f"{prefix}{name}{ITEM}")


def _kernel_groups(prefix: str) -> Iterator[Group]:
    """Yield the settings of all kernels, and then those that each kernel adds."""
    common = entries_of(KernelConfig, prefix)
    yield Group(prefix, None, _about(KernelConfig), common)
    known = {entry.key for entry in common}
    for name, schema in KERNEL_SCHEMAS.items():
        own = tuple(entry for entry in entries_of(schema, prefix) if entry.key not in known)
        yield Group(prefix, name, _about(schema), own)


def _about(owner: type) -> str:
    text = " ".join((owner.__doc__ or "").split())
    return _SENTENCE.split(_ROLE.sub(r"\1", text).replace("`", ""), maxsplit=1)[0].rstrip(".")
