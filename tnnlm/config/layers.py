"""Settings of one source (a YAML file, the command line or a checkpoint) by key, checked against a schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, get_type_hints

from tnnlm.config.components import is_component, opened
from tnnlm.config.schema import Config
from tnnlm.config.values import (
    Node,
    Origin,
    is_bracketed,
    is_list,
    is_supported,
    list_items,
    one_line,
    shown,
    stored,
    word,
)
from tnnlm.config.yaml_files import YamlProblem, read_yaml
from tnnlm.errors import ConfigError
from tnnlm.kernels import KERNEL_SCHEMAS, KernelConfig

KERNEL = "model.kernel"
"""Group whose settings depend on ``model.kernel.name``."""
COMMAND_LINE = "command line"
_MISSPELT = 2
"""Maximum difference in length between a key and the one that it is probably a misspelling of."""


class Setting(NamedTuple):
    """Field of a settings dataclass."""

    hint: Any
    """Type of the field."""
    metadata: Mapping[str, Any]
    """Bounds and choices, created by :mod:`tnnlm.fields`."""
    default: Any
    """Default value, or ``dataclasses.MISSING`` if the field must be set."""


@dataclass(frozen=True)
class Schema:
    """Settings and groups of :class:`Config` by full key, with one of the kernels."""

    settings: dict[str, Setting] = field(default_factory=dict)
    groups: dict[str, type] = field(default_factory=dict)

    @staticmethod
    def of(kernel: type[KernelConfig]) -> Schema:
        """Return the schema of the configuration with a kernel's settings in the group ``model.kernel``."""
        if kernel not in _SCHEMAS:
            schema = Schema()
            schema._add(Config, "", kernel)
            _SCHEMAS[kernel] = schema
        return _SCHEMAS[kernel]

    def _add(self, owner: type, prefix: str, kernel: type[KernelConfig]) -> None:
        hints = get_type_hints(owner)
        for item in fields(owner):
            key = f"{prefix}{item.name}"
            hint = kernel if key == KERNEL else hints[item.name]
            if is_dataclass(hint):
                self.groups[key] = hint
                self._add(hint, f"{key}.", kernel)
            elif not is_supported(hint):
                raise ConfigError(
                    f"{key}: a setting can't have the type {hint}",
                    "use str, int, float, bool, a list of one of these, or a dataclass",
                )
            else:
                made = item.default_factory
                default = item.default if made is MISSING else made()
                self.settings[key] = Setting(hint, item.metadata, default)


_SCHEMAS: dict[type[KernelConfig], Schema] = {}
"""Schemas by the type of the kernel's settings, which are the same in the whole process."""


@dataclass
class Layer:
    """Settings of one source."""

    place: str
    """Name of the source in error messages."""
    trees: Sequence[Node]
    """Groups of settings; later ones override earlier ones."""
    nodes: dict[str, Node] = field(default_factory=dict)
    """Settings by full key, without those of the kernel until :meth:`add_kernel` is called."""
    kernels: list[Node] = field(default_factory=list)
    """Settings of the kernel, whose schema depends on its name."""

    def __post_init__(self) -> None:
        """Collect the settings of all trees."""
        for tree in self.trees:
            self._collect(tree, "", Schema.of(KernelConfig))

    def add_kernel(self, schema: Schema) -> None:
        """Add the settings of the kernel to ``nodes``.

        Raises:
            ConfigError: If the kernel of ``schema`` doesn't have one of them.
        """
        for group in self.kernels:
            self._collect(group, f"{KERNEL}.", schema)

    def add_former(self, schema: Schema) -> None:
        """Add settings that didn't exist when a run or checkpoint was saved, with the values of that time."""
        if all(tree.origin in (Origin.WORD, Origin.FILE) for tree in self.trees):
            return
        for key, setting in schema.settings.items():
            if "before" in setting.metadata and key not in self.nodes:
                self.nodes[key] = stored(setting.metadata["before"], self.place)

    def kernel_settings(self, name: str) -> Iterator[Node]:
        """Yield the nodes of one setting of the kernel, in the order in which they were given."""
        for group in self.kernels:
            if name in group.value:
                yield group.child(group.value[name])

    def _collect(self, group: Node, prefix: str, schema: Schema) -> None:
        for name, value in group.value.items():
            key, node = f"{prefix}{name}", group.child(value)
            if key in schema.groups and "." not in str(name):
                inner = as_group(node, key)
                if key == KERNEL:
                    self.kernels.append(inner)
                else:
                    self._collect(inner, f"{key}.", schema)
            elif key in schema.settings and "." not in str(name):
                self._set(key, node, schema.settings[key].hint)
            else:
                raise _unknown(key, node.place, schema)

    def _set(self, key: str, node: Node, hint: Any) -> None:
        """Set a value; a value of a list that is given repeatedly, without brackets, is added to the list."""
        before = self.nodes.get(key)
        if is_component(hint):
            node = _opened(key, node)
        if before is not None and is_list(hint) and node.origin is Origin.WORD and not is_bracketed(node):
            try:
                node = replace(node, value=[*list_items(before), *list_items(node)])
            except ValueError as error:
                raise ConfigError(f"{key}={shown(node)}: {error} ({node.place})") from None
        self.nodes[key] = node


def word_tree(text: str) -> Node:
    """Return the group of settings that a word of the command line, ``key=value``, contains.

    Raises:
        ConfigError: If the word has no key or no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{one_line(text)}: expected key=value, for example optim.lr=1e-3")
    if "${" in key:
        raise ConfigError(f"{one_line(key)}: is no key ({COMMAND_LINE})", "use interpolations in values only")
    node = word(value, COMMAND_LINE)
    for name in reversed(key.split(".")):
        node = Node({name: node}, COMMAND_LINE, Origin.WORD)
    return node


def as_group(node: Node, key: str) -> Node:
    """Return a group of settings; on the command line it is written ``key={name: value}``.

    Raises:
        ConfigError: If the node is not a group.
    """
    node = parsed(node, key)
    if not isinstance(node.value, dict):
        raise ConfigError(f"{key}={shown(node)}: expected a group of settings, {key}.NAME=... ({node.place})")
    return node


def parsed(node: Node, key: str) -> Node:
    """Return a node whose text, if it is from the command line, is read as YAML.

    Raises:
        ConfigError: If it isn't valid YAML.
    """
    if node.origin is not Origin.WORD or not isinstance(node.value, str):
        return node
    try:
        return read_yaml(node.value, Origin.FILE, lambda line: node.place, f"{key}.")
    except YamlProblem as problem:
        raise ConfigError(f"{key}={shown(node)}: {problem} ({node.place})", problem.remedy) from None


def _opened(key: str, node: Node) -> Node:
    try:
        return opened(node)
    except ValueError as error:
        raise ConfigError(f"{key}={shown(node)}: {error} ({node.place})") from None


def _unknown(key: str, place: str, schema: Schema) -> ConfigError:
    """Return the error for an unknown key, which suggests a key only if one is similar."""
    known = [*schema.settings, *schema.groups]
    if key in known:
        remedy = f"nest it in the group {key.rpartition('.')[0]}"
    else:
        near = _of_other_kernel(key) or _nearest(key, known)
        remedy = f"did you mean {near}?" if near in known else near
    return ConfigError(f"{one_line(key)}: unknown key ({place})", remedy)


def _of_other_kernel(key: str) -> str:
    group, _, leaf = key.rpartition(".")
    schemas = {name: Schema.of(kernel).settings for name, kernel in KERNEL_SCHEMAS.items()}
    owners = [name for name, settings in schemas.items() if f"{KERNEL}.{leaf}" in settings]
    return f"it is a setting of {KERNEL}.name={' or '.join(owners)}" if owners and group == KERNEL else ""


def _nearest(key: str, known: Sequence[str]) -> str:
    """Return the known key that ``key`` is probably a misspelling of; empty if there is none."""
    group, _, leaf = key.rpartition(".")
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    for candidates, cutoff in ((leaves, 1.0), (siblings, 0.7), (leaves, 0.77)):
        # A part of a longer name is another name: data.dataset is no misspelling of data.
        similar = [name for name in candidates if abs(len(name) - len(leaf)) <= _MISSPELT]
        if near := difflib.get_close_matches(leaf, similar, n=1, cutoff=cutoff):
            return candidates[near[0]]
    return ""
