"""Values of settings, which are read by the type of their field.

YAML 1.1 infers the type of an unquoted value from its spelling: ``on`` becomes true, ``1:30`` ninety and
``007`` seven. Here the field determines the type: text is taken literally, and numbers are decimal.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any, Union, get_args, get_origin

from tnnlm.fields import Component

_SCALARS = {str, int, float, bool, Component}


class Origin(Enum):
    """Origin of a value, which determines its syntax."""

    WORD = "word of the command line"
    FILE = "YAML file"
    RUN = "configuration that a run saved"
    STORED = "settings stored with a model or checkpoint"


@dataclass(frozen=True)
class Node:
    """Value of a setting as given, before the type of the field is applied."""

    value: Any
    """Text, None, a list, or a dict by name; of stored settings also a number or a boolean. Items of lists
    and dicts are nodes, except in stored settings."""
    place: str
    """Place that error messages report, such as ``command line``."""
    origin: Origin
    quoted: bool = False
    """Whether the text was in quotes, so that null, for example, is a word."""

    def child(self, value: Any) -> Node:
        """Return the node of an item of this list or dict."""
        return value if isinstance(value, Node) else stored(value, self.place)


def stored(value: Any, place: str) -> Node:
    """Return a node for a plain value that is stored with a model or checkpoint."""
    return Node(value, place, Origin.STORED, quoted=True)


def word(text: str, place: str) -> Node:
    """Return a node for text of the command line, without the pair of quotes that may surround it.

    The quotes are part of the text if quotes of that kind are inside as well: ``"a" and "b"``.
    """
    if len(text) > 1 and text[0] in "'\"" and text[0] == text[-1] and text[0] not in text[1:-1]:
        return Node(text[1:-1], place, Origin.WORD, quoted=True)
    return Node(text, place, Origin.WORD)


def is_bracketed(node: Node) -> bool:
    """Return whether a node is a list in brackets on the command line, ``[a, b]``."""
    text = node.value
    is_text = node.origin is Origin.WORD and not node.quoted and isinstance(text, str)
    return is_text and text.startswith("[") and text.endswith("]")


def is_list(hint: Any) -> bool:
    """Return whether a field is a list, or a list or None."""
    return any(get_origin(kind) is list for kind in kinds_of(hint))


def item_type(hint: Any) -> Any:
    """Return the type of the items of a list; None for a field that is not a list alone."""
    return get_args(hint)[0] if get_origin(hint) is list else None


def is_supported(hint: Any) -> bool:
    """Return whether a type can be read.

    These are scalars, components, lists of these, unions with None, and a list of dataclasses.
    """
    if is_dataclass(item_type(hint)):
        return True
    kinds = set(kinds_of(hint)) - {types.NoneType}
    if is_list(hint):
        return len(kinds) == 1 and all(kind in _SCALARS for kind in get_args(kinds.pop()))
    return bool(kinds) and kinds <= _SCALARS


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the types that a type hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def list_items(node: Node) -> list[Node]:
    """Return the items of a list; a single value is a list of one item.

    Raises:
        ValueError: If the node is null or a group, or the brackets hold quotes or commas out of place.
    """
    if isinstance(node.value, list):
        return [node.child(item) for item in node.value]
    if is_bracketed(node):
        return [word(item, node.place) for item in _split(node.value[1:-1])]
    is_null = node.origin is Origin.WORD and not node.quoted and node.value == "null"
    if node.value is None or is_null or isinstance(node.value, dict):
        raise ValueError("expected a list, [a,b] or [] for an empty one")
    return [node]


def read_value(
    node: Node, hint: Any, keyword: str | None = None, resolve: Callable[[str], str] = lambda text: text
) -> Any:
    """Return the value of a node for a field.

    Args:
        node: Value as given.
        hint: Type of the field: str, int, float, bool, a list of one of these, or a union with None.
        keyword: Text that a field of numbers allows as well, such as ``auto``.
        resolve: Function that replaces the interpolations of a text.

    Raises:
        ValueError: If the value is not of that type; the message is the problem without key and place.
    """
    kinds = kinds_of(hint)
    is_null = node.origin is Origin.WORD and not node.quoted and node.value == "null"
    if types.NoneType in kinds and (node.value is None or is_null):
        return None
    if isinstance(node.value, dict) and not is_list(hint):
        raise ValueError("is a single setting, not a group of settings")
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if is_list(hint):
        (item,) = get_args(next(kind for kind in kinds if get_origin(kind) is list))
        return [read_value(part, item, keyword, resolve) for part in list_items(node)]
    if type(node.value) is not str:
        return _typed(node.value, kinds, keyword)
    return _from_text(node, resolve(node.value), kinds, keyword)


def read_int(text: str, *, radix: bool = False) -> int:
    """Return a decimal integer; ``1_000`` and ``1e3`` are allowed.

    Args:
        text: Text of the number.
        radix: Whether ``0o17`` and ``0x1F`` are numbers, as in YAML 1.2.

    Raises:
        ValueError: If the text is not an integer, or has leading zeros, which are octal in YAML 1.1.
    """
    digits = text.strip()
    if radix and re.fullmatch(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", digits):
        return int(digits, 0)
    number = _decimal(digits, "an integer")
    if number.adjusted() > _DIGITS:  # before the digits are written out: 1e999999999 would fill the memory
        raise ValueError("is too large")
    if number.as_tuple().exponent < -400 or number != number.to_integral_value():  # type: ignore[operator]
        raise ValueError("expected an integer")
    return int(number)


def read_float(text: str) -> float:
    """Return a decimal number; ``1_000``, ``1e3``, ``inf`` and ``nan`` are allowed.

    Raises:
        ValueError: If the text is not a number, is too large for a float, or has leading zeros.
    """
    digits = text.strip()
    if re.fullmatch(r"[+-]?\.?inf|\.?nan", digits, re.IGNORECASE):
        return float(digits.replace(".", ""))
    number = float(_decimal(digits, "a number"))
    if math.isinf(number):
        raise ValueError("is too large")
    return number


def read_bool(text: str) -> bool:
    """Return a boolean.

    Raises:
        ValueError: If the text is neither true nor false; yes, no, on and off are text.
    """
    if text.strip() in ("true", "True", "TRUE"):
        return True
    if text.strip() in ("false", "False", "FALSE"):
        return False
    raise ValueError("expected true or false")


def check_text(text: str) -> str:
    """Return a text unchanged.

    Raises:
        ValueError: If it contains a NUL character, which no path can contain, or bytes that are not UTF-8.
    """
    if "\0" in text:
        raise ValueError("contains a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("is not UTF-8 text")
    return text


def shown(node: Node) -> str:
    """Return a value for an error message, in one line."""
    value = node.value
    if isinstance(value, list):
        return f"[{', '.join(shown(node.child(item)) for item in value[:3])}{', ...' * (len(value) > 3)}]"
    if isinstance(value, dict):
        return "{...}"
    return one_line("null" if value is None else value)


def typed(value: Any) -> str:
    """Return the value of a setting as typed on the command line, also that of a group of settings."""
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value) if _is_set(value, item)}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {typed(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and value != value.strip():
        return f"'{value}'"
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _is_set(group: Any, item: Field[Any]) -> bool:
    """Return whether a setting of a group differs from its default."""
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return bool(getattr(group, item.name) != default)


def one_line(value: object) -> str:
    """Return a value as text for an error message, shortened, and in one line."""
    text = str(value)
    short = text if len(text) <= 80 else f"{text[:77]}..."
    return short if short.isprintable() else ascii(short)


_DIGITS = 80
"""Maximum number of digits of an integer, far above any bound of a setting."""
_ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,]*?)\s*(,|\Z)""")
_READERS: dict[type, Callable[[str], Any]] = {bool: read_bool, int: read_int, float: read_float}


def _from_text(node: Node, text: str, kinds: tuple[Any, ...], keyword: str | None) -> Any:
    is_word = str in kinds and keyword is None
    if is_word and (node.quoted or kinds == (str,)):
        return check_text(text)
    if text == keyword:
        return text
    problem = ""
    for kind, read in _READERS.items():
        if kind not in kinds:
            continue
        try:
            if kind is int and node.origin in (Origin.FILE, Origin.RUN) and not node.quoted:
                return read_int(text, radix=True)
            return read(text)
        except ValueError as error:
            problem = str(error)
    if is_word:
        return check_text(text)
    raise ValueError(problem if keyword is None else f"expected a number or {keyword}")


def _typed(value: Any, kinds: tuple[Any, ...], keyword: str | None) -> Any:
    """Return a value that is not text: a number of stored settings, or something that no field takes."""
    if type(value) in kinds and value is not None:
        return value
    if type(value) is int and float in kinds and abs(value) <= 1 << 1000:
        return float(value)
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    if keyword is not None:
        raise ValueError(f"expected a number or {keyword}")
    raise ValueError(f"expected {' or '.join(names[kind] for kind in kinds)}")


def _decimal(digits: str, name: str) -> Decimal:
    whole = r"[0-9]+(?:_[0-9]+)*"
    if not re.fullmatch(rf"[+-]?(?:{whole}(?:\.(?:{whole})?)?|\.{whole})(?:[eE][+-]?[0-9]+)?", digits):
        raise ValueError(f"expected {name} in decimal notation, such as 100 or 1e3")
    if re.match(r"[+-]?0_*[0-9]", digits):
        decimal = re.sub(r"^([+-]?)[0_]+(?=[0-9])", r"\1", digits)
        raise ValueError(f"leading zeros are ambiguous, because YAML 1.1 reads octal; write {decimal}")
    if len(digits) > 400:
        raise ValueError("has too many digits")
    try:
        return Decimal(digits)
    except InvalidOperation:  # an exponent of more digits than a machine word
        raise ValueError("has an exponent out of range") from None


def _split(text: str) -> list[str]:
    """Split the inside of brackets at commas outside of quotes, and keep the quotes of each item."""
    items, end = [], 0
    while found := _ITEM.match(text, end):
        items.append(found[1])
        end = found.end()
        if not found[2]:
            break
    if not items[-1]:  # empty brackets, or a comma at the end, which YAML allows as well
        items.pop()
    if not all(items):
        raise ValueError("has an empty item between commas")
    return items
