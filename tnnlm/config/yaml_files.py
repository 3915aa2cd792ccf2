"""Reading and writing of YAML by the rules of YAML 1.2, without inferring the types of values.

Only ``null``, ``~`` and an empty value are resolved here; any other scalar stays the text of the file until
:mod:`tnnlm.config.values` reads it by the type of its field. Tags, which could create objects, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode, SequenceNode

from tnnlm.config.values import Node, Origin
from tnnlm.errors import ConfigError
from tnnlm.reading import read_bytes

LARGEST = 1 << 22
"""Largest number of bytes of a file of settings."""
MOST_NODES = 100_000
"""Largest number of keys, values and lists in a document, which are parsed in Python."""
_TAG = "tag:yaml.org,2002:"


class YamlProblem(Exception):
    """Text that is not YAML, or that no settings can be read from."""

    def __init__(self, problem: str, line: int | None = None, remedy: str = "") -> None:
        super().__init__(problem)
        self.line = line
        self.remedy = remedy


def read_yaml_file(path: Path, origin: Origin = Origin.FILE) -> Node:
    """Return the settings in a YAML file; an empty file has none.

    Raises:
        ConfigError: If the file is missing or not valid YAML, or a key is given twice; the message contains
            the file, the line and the problem.
    """
    data = read_bytes(path, "", ConfigError, largest=LARGEST, missing="no such configuration file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    try:
        node = read_yaml(text, origin, lambda line: f"{path}, line {line}")
    except YamlProblem as problem:
        where = f"{path}: " if problem.line is None else f"{path}: line {problem.line}: "
        raise ConfigError(f"{where}{problem}", problem.remedy) from None
    if node.value is None:
        return Node({}, str(path), origin)
    if not isinstance(node.value, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, such as 'model:' and 'data:'")
    return node


def read_yaml(text: str, origin: Origin, place: Callable[[int], str], prefix: str = "") -> Node:
    """Return the value that a YAML document contains.

    Args:
        text: The document.
        origin: Origin of the nodes.
        place: Function that names a line for error messages; lines are counted from 1.
        prefix: Key of the group that the document contains, with a dot.

    Raises:
        YamlProblem: If the document is not valid YAML, or a key is given twice.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        return (
            Node(None, place(1), origin) if root is None else _Converter(origin, place).convert(root, prefix)
        )
    except yaml.MarkedYAMLError as error:
        raise _described(error) from None
    except yaml.YAMLError as error:  # an unprintable character, reported with its position only
        raise YamlProblem(str(error).splitlines()[0]) from None
    except (ValueError, OverflowError):  # an escape such as "\\UFFFFFFFF"
        raise YamlProblem("has an escape that is not a character") from None
    except RecursionError:
        raise YamlProblem("is nested too deeply") from None


def write_yaml(data: dict[str, Any]) -> str:
    """Return a YAML document that :func:`read_yaml` reads without a change of any text."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_CORE = re.compile(
    r"[-+]?(\.[0-9]|[0-9])[0-9.]*([eE][-+]?[0-9]+)?|[-+]?\.?inf|\.?nan|0[xo][0-9a-f]+", re.IGNORECASE
)
"""Text that YAML 1.2 reads as a number if it isn't quoted; PyYAML quotes the numbers of YAML 1.1 alone."""


class _Dumper(yaml.SafeDumper):
    """Dumper that escapes line breaks: in its other styles PyYAML folds those of Unicode into blanks."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return the scalar for a text."""
        style = None if text.isprintable() and not _CORE.fullmatch(text) else '"'
        return self.represent_scalar(f"{_TAG}str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


class _Loader(yaml.SafeLoader):
    """Loader that resolves null only; PyYAML's own resolvers follow YAML 1.1."""

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and count it."""
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise YamlProblem(f"has more than {MOST_NODES:,} keys and values")
        return super().compose_node(parent, index)

    yaml_implicit_resolvers = {  # noqa: RUF012  by first character, as in the base class
        letter: [(f"{_TAG}null", re.compile(r"(~|null|Null|NULL|)\Z"))] for letter in ("", "~", "n", "N")
    }


class _Converter:
    """Conversion of one document; anchors may share a node, but must not contain themselves."""

    def __init__(self, origin: Origin, place: Callable[[int], str]) -> None:
        self.origin = origin
        self.place = place
        self.done: dict[int, Node] = {}
        self.open: set[int] = set()

    def convert(self, node: yaml.Node, prefix: str = "") -> Node:
        """Return the node of the settings for a node of YAML in a group with the key ``prefix``."""
        line = node.start_mark.line + 1
        if id(node) in self.open:
            raise YamlProblem("an alias stands inside of its own anchor", line)
        if id(node) not in self.done:
            self.open.add(id(node))
            self.done[id(node)] = self._converted(node, prefix, line)
            self.open.remove(id(node))
        return self.done[id(node)]

    def _converted(self, node: yaml.Node, prefix: str, line: int) -> Node:
        kind = {ScalarNode: "str", SequenceNode: "seq", MappingNode: "map"}[type(node)]
        if node.tag not in (f"{_TAG}{kind}", f"{_TAG}null"):
            raise YamlProblem(f"the tag {node.tag.replace(_TAG, '!!')} is not supported", line, "remove it")
        quoted = isinstance(node, ScalarNode) and node.style is not None
        return Node(self._value(node, prefix), self.place(line), self.origin, quoted)

    def _value(self, node: yaml.Node, prefix: str) -> object:
        if isinstance(node, MappingNode):
            return self._group(node, prefix)
        if isinstance(node, SequenceNode):
            return [self.convert(item, prefix) for item in node.value]
        if node.tag == f"{_TAG}null":
            return None
        # JSON, which is YAML 1.2 as well, may write a character as two escapes; a lone half is unchanged.
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def _group(self, node: MappingNode, prefix: str) -> dict[str, Node]:
        lines: dict[str, int] = {}
        group = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise YamlProblem("a key is not text", line)
            if key.value in lines:
                first = f", first on line {lines[key.value]}" if lines[key.value] < line else ""
                raise YamlProblem(f"{prefix}{key.value} is set twice{first}", line, "remove one")
            lines[key.value] = line
            group[key.value] = self.convert(value, f"{prefix}{key.value}.")
        return group


def _described(error: yaml.MarkedYAMLError) -> YamlProblem:
    """Return the problem of a parser's error in one line, with the line that it was found on."""
    mark = error.problem_mark or error.context_mark
    problem = (error.problem or str(error)).splitlines()[0]
    context = f" {error.context}" if error.context else ""
    remedy = ""
    if "another document" in problem:
        problem, context = "a second document begins", ""
    if "'\\t'" in problem:
        remedy = "indent with spaces, not with tabs"
    elif "alias" in f"{problem}{context}" or "cannot start any token" in problem:
        remedy = "put text that begins with a special character in quotes"
    return YamlProblem(f"{problem}{context}", None if mark is None else mark.line + 1, remedy)
