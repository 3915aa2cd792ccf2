"""JSON schema (draft 2020-12) of a file of settings, by which editors complete, explain and check it.

The schema accepts every value that :mod:`tnnlm.config.loader` reads. It knows the settings, their types,
bounds and choices, and the kernels; conditions between settings are checked by the loader alone.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from tnnlm.config.catalogue import Entry, entries_of, groups
from tnnlm.config.layers import KERNEL, Schema
from tnnlm.config.schema import Config
from tnnlm.config.values import is_list, kinds_of
from tnnlm.fields import Component
from tnnlm.kernels import KERNEL_SCHEMAS, KernelConfig

_INTERPOLATION = {"$ref": "#/$defs/interpolation"}
_DEFINITIONS: dict[str, Any] = {
    "component": {
        "description": "Class path, or class_path with the arguments of the class, as in Lightning CLI.",
        "anyOf": [
            {"type": "string", "pattern": r"^[^\W\d]\w*(\.[^\W\d]\w*)*$|\$\{"},
            {
                "type": "object",
                "properties": {"class_path": {"type": "string"}, "init_args": {"type": ["object", "null"]}},
                "required": ["class_path"],
                "additionalProperties": False,
            },
        ],
    },
    "interpolation": {
        "description": "Value of another setting, ${key}, or of a variable, ${oc.env:NAME,default}.",
        "type": "string",
        "pattern": r"\$\{",
    },
    "number": {
        "description": "Number in a notation that YAML reads as text, such as 1_000 or '1e3'.",
        "type": "string",
        "pattern": r"^\s*[+-]?(\.?[0-9]|\.?inf|\.?nan|0[xo])[0-9A-Fa-f_.eE+-]*\s*$",
    },
}


def json_schema() -> dict[str, Any]:
    """Return the schema of a file for ``--config``."""
    root = _group(Config, "")
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Settings of a tnnlm run"}
    return {**about, **root, "$defs": _DEFINITIONS | _kernels()}


def schema_text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _group(owner: type, prefix: str) -> dict[str, Any]:
    properties: dict[str, Any] = {entry.name: _value(entry) for entry in entries_of(owner, prefix)}
    for key, inner in Schema.of(KernelConfig).groups.items():
        if key.startswith(prefix) and "." not in key.removeprefix(prefix):
            properties[key.removeprefix(prefix)] = _kernel() if key == KERNEL else _group(inner, f"{key}.")
    about = next(group.about for group in groups() if group.prefix == prefix)
    return {
        "description": f"{about}.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _kernel() -> dict[str, Any]:
    """Return the schema of ``model.kernel``, whose settings depend on its name."""
    chosen = [
        {"if": _named(name), "then": {"$ref": f"#/$defs/kernel.{name}"}} for name in sorted(KERNEL_SCHEMAS)
    ]
    custom = {"not": _named(*KERNEL_SCHEMAS)}
    return {
        "description": "Convolution kernel and its settings, which depend on its name.",
        "type": "object",
        "properties": {entry.name: _value(entry) for entry in entries_of(KernelConfig, f"{KERNEL}.")}
        | {"name": {"anyOf": [{"enum": sorted(KERNEL_SCHEMAS)}, {"type": "string"}], "default": "tno"}},
        "allOf": [*chosen, {"if": custom, "then": {"anyOf": [{"required": ["module"]}, _interpolated()]}}],
    }


def _named(*names: str) -> dict[str, Any]:
    """Return the condition that the kernel is one of ``names``; without a name, it is the default."""
    rule: dict[str, Any] = {"properties": {"name": {"enum": sorted(names)}}}
    return rule if KernelConfig().name in names else rule | {"required": ["name"]}


def _interpolated() -> dict[str, Any]:
    return {"properties": {"name": _INTERPOLATION}}


def _kernels() -> dict[str, Any]:
    """Return the settings of each kernel."""
    return {
        f"kernel.{name}": {
            "properties": {entry.name: _value(entry) for entry in entries_of(owner, f"{KERNEL}.")},
            "additionalProperties": False,
        }
        for name, owner in sorted(KERNEL_SCHEMAS.items())
    }


def _value(entry: Entry) -> dict[str, Any]:
    """Return the schema of a setting."""
    kinds = kinds_of(entry.hint)
    if is_list(entry.hint):
        (item,) = get_args(next(kind for kind in kinds if get_origin(kind) is list))
        rules = [{"type": "array", "items": _any([_scalar(item, entry)])}, _scalar(item, entry)]
    elif entry.options:
        rules = [{"enum": list(entry.options)}]
    else:
        word = entry.metadata.get("word")
        rules = [
            _scalar(kind, entry) for kind in kinds if kind is not NoneType and not (kind is str and word)
        ]
        rules += [{"const": word}] if word else []
    if any(kind in (int, float) for kind in kinds):
        rules.append({"$ref": "#/$defs/number"})
    text = any(rule.get("type") == ["string", "number", "boolean"] for rule in rules)
    rules += [] if text else [_INTERPOLATION]
    rules += [{"type": "null"}] if NoneType in kinds else []
    default = {} if entry.default is MISSING else {"default": entry.default}
    return {"description": entry.text, **default, **_any(rules)}


def _any(rules: list[dict[str, Any]]) -> dict[str, Any]:
    return rules[0] if len(rules) == 1 else {"anyOf": rules}


def _scalar(kind: Any, entry: Entry) -> dict[str, Any]:
    if is_dataclass(kind):
        assert isinstance(kind, type)
        properties = {part.name: _value(part) for part in entries_of(kind, f"{entry.key}.")}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    if kind is Component:
        return {"$ref": "#/$defs/component"}
    if kind is bool:
        return {"type": "boolean"}
    if kind is str:
        # Text such as 2024 or true needs no quotes, because the setting determines the type.
        rule: dict[str, Any] = {"type": ["string", "number", "boolean"]}
        return rule if entry.metadata.get("empty") else rule | {"minLength": 1}
    bounds = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}
    limits = {bounds[name]: entry.metadata[name] for name in bounds if entry.metadata.get(name) is not None}
    return {"type": "integer" if kind is int else "number", **limits}
