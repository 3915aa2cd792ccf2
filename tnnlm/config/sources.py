"""Source of the data: which settings each value of ``data.source`` uses, and which of them select it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields

from tnnlm.config.interpolation import Values
from tnnlm.config.layers import Layer
from tnnlm.config.text_sources import SourceConfig
from tnnlm.config.values import Origin, stored
from tnnlm.errors import ConfigError

SOURCE = "data.source"
TEXT = ("stdlib", "files", "hub")
"""Sources of text."""
ALL_TEXT = (*TEXT, "mixture")
SELECTS = {"files": "files", "hub_name": "hub", "tokens": "tokens", "sources": "mixture"}
"""Settings that name data of a single source, which they select where ``data.source`` is not set."""
USED_BY: dict[str, tuple[str, ...]] = {
    "files": ("files",),
    "document_separator": ("files",),
    "tokens": ("tokens",),
    "token_type": ("tokens",),
    "sources": ("mixture",),
    "validation": (*TEXT, "tokens"),
    "text_column": ("files", "hub"),
    "hub_name": ("hub",),
    "hub_config": ("hub",),
    "hub_split": ("hub",),
    "hub_val_split": ("hub",),
    "streaming": ("hub",),
    "max_documents": TEXT,
    "protocol": ALL_TEXT,
    "normalize_text": ALL_TEXT,
    "tokenizer": (*ALL_TEXT, "tokens"),
    "tokenizer_sample": ALL_TEXT,
    "mask_token": (*ALL_TEXT, "tokens"),
    "mask_fraction": (*ALL_TEXT, "tokens"),
    "val_fraction": (*ALL_TEXT, "tokens", "lra"),
    "listops": ("listops",),
    "lra": ("lra",),
}
"""Sources that use a setting of the group ``data``; a setting that is not listed is used by all of them."""
REPLACED_BY = {
    "val_fraction": ("validation", "hub_val_split"),
    "hub_val_split": ("validation",),
    "tokenizer_sample": ("tokenizer",),
}
"""Settings of the group ``data`` that have no effect if one of the others is set."""


def select_source(layers: Sequence[Layer], values: Values) -> list[Layer]:
    """Select the source of the data, and return the layers that have to describe it.

    The last layer that sets ``data.source``, or names data of a single source, selects the source: layers
    before it may describe another one, as a configuration file whose model is trained on other text. The
    settings that a run saved may, too.

    Args:
        layers: Settings of the file and the command line, in this order.
        values: Values of all layers; ``data.source`` is set if it is implied.

    Raises:
        ConfigError: If settings name data of two sources.
    """
    described: list[Layer] = []
    for layer in reversed(layers):
        if any(tree.origin is Origin.RUN for tree in layer.trees):
            break
        described.append(layer)
        if SOURCE in layer.nodes:
            break
        given = _given(layer, values)
        named = [name for name in SELECTS if name in given]
        if len({SELECTS[name] for name in named}) > 1:
            raise ConfigError(
                f"data.{named[1]}: can't be used together with data.{named[0]} ({given[named[1]]})",
                "omit one of them",
            )
        if named:
            values.set(SOURCE, stored(SELECTS[named[0]], given[named[0]]))
            break
    return described


def check_source(layers: Sequence[Layer], described: Sequence[Layer], values: Values) -> None:
    """Raise an error for settings that the selected source does not use; defaults are accepted.

    Args:
        layers: All layers; later ones override earlier ones.
        described: Layers that have to describe the source, later ones first.
        values: Values of all layers.

    Raises:
        ConfigError: If a setting belongs to another source: the run would silently use other data.
    """
    source = values[SOURCE]
    for layer, number in zip(described, reversed(range(len(layers))), strict=False):
        for name, place in _given(layer, values).items():
            for other in REPLACED_BY.get(name, ()):
                # A later layer may replace what an earlier one sets.
                given = any(f"data.{other}" in earlier.nodes for earlier in layers[: number + 1])
                if given and values[f"data.{other}"] and source in USED_BY[other]:
                    raise ConfigError(
                        f"data.{name}: is not used with data.{other}{_origin(other, values)} ({place})",
                        "omit one of them",
                    )
            owners = USED_BY.get(name, (source,))
            if source not in owners:
                raise ConfigError(
                    f"data.{name}: is not used with data.source={source} ({place})",
                    f"omit it, or set data.source={' or '.join(owners)} too",
                )
    if source == "mixture":
        _check_mixture(values["data.sources"], values)


def kind_of(part: SourceConfig) -> str | None:
    """Return the value of ``data.source`` for a source of a mixture; None if it names no data, or two."""
    if part.source != "auto":
        return part.source
    named = [kind for name, kind in SELECTS.items() if getattr(part, name, None)]
    return named[0] if len(named) == 1 else None


def _check_mixture(parts: Sequence[SourceConfig], values: Values) -> None:
    """Raise an error if the sources of a mixture are too few, or have settings without effect."""
    place = values.given("data.sources") or ""
    if len(parts) < 2:
        raise ConfigError(
            f"data.sources: a mixture needs two sources or more{place}",
            "add one, or set data.files, data.hub_name or data.tokens instead",
        )
    for number, part in enumerate(parts, 1):
        where, kind = f"data.sources[{number}]", kind_of(part)
        if kind is None:
            raise ConfigError(
                f"{where}: its data is not clear{place}",
                "set one of files, hub_name, tokens and source: stdlib",
            )
        for item in fields(part):
            default = item.default if item.default is not MISSING else []
            if getattr(part, item.name) == default:
                continue
            if kind not in USED_BY.get(item.name, (kind,)):
                raise ConfigError(f"{where}.{item.name}: is not used with source={kind}{place}", "omit it")
            for other in REPLACED_BY.get(item.name, ()):
                if getattr(part, other, None):
                    raise ConfigError(
                        f"{where}.{item.name}: is not used with {other}{place}", "omit one of them"
                    )


def _origin(name: str, values: Values) -> str:
    """Return what set a setting of ``data`` if it was not the user, for an error message."""
    brought = name == "tokenizer" and values["init.weights"] and values.given("data.tokenizer") is None
    return ", which init.weights sets" if brought else ""


def _given(layer: Layer, values: Values) -> dict[str, str]:
    """Return the place of each setting, or group of settings, of ``data`` that is not at its default."""
    found: dict[str, str] = {}
    for key, node in layer.nodes.items():
        group, _, name = key.partition(".")
        if group == "data" and values.read(key, node) != values.schema.settings[key].default:
            found.setdefault(name.partition(".")[0], node.place)
    return found
