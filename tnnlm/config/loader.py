"""Loading of a checked ``Config`` from defaults, a YAML file and overrides, and its conversion to plain data.

The YAML file overrides the defaults, and ``key=value`` arguments override both. Every value is read by the
type of its field (:mod:`tnnlm.config.values`). Unknown keys, wrong types and values out of bounds raise
``ConfigError`` with the key and the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tnnlm.config.checks import check_not_empty, check_settings, check_value, leaves
from tnnlm.config.consistency import (
    check_averaging,
    check_context,
    check_initial,
    check_muon,
    check_name,
    check_schedule,
    check_sharding,
    settle_method,
    settle_task,
)
from tnnlm.config.data_consistency import check_format, check_protocol, check_tokens
from tnnlm.config.interpolation import Values, escaped, stored_text
from tnnlm.config.kernel_module import Named, run_kernel_module
from tnnlm.config.layers import COMMAND_LINE, KERNEL, Layer, Schema, Setting, word_tree
from tnnlm.config.methods import check_effective_settings
from tnnlm.config.schema import Config, ModelConfig
from tnnlm.config.sources import check_source, select_source
from tnnlm.config.values import Origin, one_line, stored, typed
from tnnlm.config.yaml_files import read_yaml_file, write_yaml
from tnnlm.errors import ConfigError
from tnnlm.fields import Component
from tnnlm.kernels import KERNEL_SCHEMAS, KernelConfig
from tnnlm.kernels.base import unknown_kernel
from tnnlm.trust import NO_CODE, Trust


class Base(NamedTuple):
    """Settings that the weights of a new run bring along, which the command line overrides."""

    settings: dict[str, Any]
    """Nested plain data, as :func:`config_to_dict` returns it."""
    place: str
    """Name of the source in error messages."""
    over_file: bool
    """Whether they override those of the file, which then isn't one that the user named."""


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    saved: bool = False,
    trust: Trust = NO_CODE,
    base: Base | None = None,
) -> Config:
    r"""Load a configuration.

    ``${oc.env:NAME}`` and ``${key}`` are replaced by the variable and by the value of the setting; other text
    such as ``${x}`` or ``\${key}`` stays text.

    Args:
        path: YAML file; None uses the defaults only.
        overrides: Overrides such as ``optim.lr=1e-3``. A list is ``[a,b]``, or its key is given repeatedly.
        saved: Whether the file is the config.yaml of a run, in which an interpolation is an error: it
            contains the values themselves, and may come from someone else.
        trust: Whether the kernel module that a saved file names may run. One that ``overrides`` or another
            file names is the user's own.
        base: Settings of the weights that the run starts from, below those of the command line; None for
            other runs.

    Raises:
        ConfigError: If the file is missing or unreadable, or a key or value is invalid.
    """
    layers = _layers(path, overrides, saved)
    if base is not None:
        layers.insert(len(layers) - 1 if base.over_file else 0, Layer(base.place, [stored(*base[:2])]))
    values = _values(layers, trust)
    described = select_source(layers, values)
    config = _config(values, trust)
    if not saved and "conversion.method" not in values.nodes:
        settle_method(config)
    check_effective_settings(config, values.given)
    check_source(layers, described, values)
    return config


def initial_weights(path: str | Path | None, overrides: Sequence[str], trust: Trust = NO_CODE) -> str | None:
    """Return ``init.weights`` as a file and overrides give it, before the other settings are read.

    If it is set, the kernel module that they name is imported, because the user's own may be that of the
    weights.

    Raises:
        ConfigError: If the file is missing or unreadable, a key is unknown, or this value is invalid.
    """
    layers = _layers(path, overrides, saved=False)
    common = _common(layers)
    weights: str | None = common["init.weights"]
    named = None if weights is None else _kernel_module(layers, common)
    if named is not None:
        run_kernel_module(named, trust)
    return weights


def config_from_dict(data: dict[str, Any], where: str = "checkpoint", trust: Trust = NO_CODE) -> Config:
    """Return the configuration that :func:`config_to_dict` stored; errors report ``where`` as its origin.

    The values are data: an interpolation in them is an error, and the kernel module that they name runs only
    as ``trust`` allows, or if this machine ran it before.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of settings")
    return _config(_values([Layer(where, [stored(data, where)])], trust), trust)


def model_config_from_dict(data: dict[str, Any], where: str = "checkpoint") -> ModelConfig:
    """Return the ``model`` group alone, as stored in converted models.

    Only the name and module of the kernel are kept: a converted model has no kernel, and the module that
    registers it is not imported.
    """
    kernel = data["kernel"]
    rest = {key: value for key, value in data.items() if key != "kernel"}
    # The vocabulary of a given tokenizer may be smaller than that of one that is trained for text.
    given = {"tokenizer": "tokenizer.json"}
    config = config_from_dict({"model": rest, "data": given}, where).model
    texts = {"name": str(kernel["name"])} | {key: text for key, text in kernel.items() if type(text) is str}
    texts = {key: stored_text(text, f"{KERNEL}.{key}", where) for key, text in texts.items()}
    config.kernel = KernelConfig(
        name=texts["name"], module=texts.get("module"), module_sha256=texts.get("module_sha256")
    )
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    r"""Return a configuration as plain dicts, lists, numbers and strings, as stored in checkpoints.

    ``${`` is written ``\${``, because an interpolation is refused when the values are read back.
    """
    found: dict[str, Any] = _escaped(asdict(config))
    return found


def changed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that differ from their defaults, with the name of the kernel, as plain data."""
    settings = Schema.of(type(config.model.kernel)).settings
    found: dict[str, Any] = {}
    for key, value, _ in leaves(config):
        default = "tno" if key == f"{KERNEL}.name" else settings[key].default
        if value != default:
            inner = found
            *groups, name = key.split(".")
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[name] = _escaped(value)
    return found


def config_to_yaml(config: Config) -> str:
    """Return the complete configuration as YAML, including defaults.

    ``${`` is escaped, so that the file gives the same values with ``--config`` as when its run is resumed.
    """
    return write_yaml(config_to_dict(config))


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    if is_dataclass(value):
        return _escaped(vars(value))
    return escaped(value) if isinstance(value, str) else value


def _layers(path: str | Path | None, overrides: Sequence[str], saved: bool) -> list[Layer]:
    """Return the settings of a file, if any, and those of the command line, which override them."""
    layers = []
    if path is not None:
        root = read_yaml_file(Path(path), Origin.RUN if saved else Origin.FILE)
        layers.append(Layer(str(path), [root]))
    return [*layers, Layer(COMMAND_LINE, [word_tree(word) for word in overrides])]


def _common(layers: list[Layer]) -> Values:
    """Return the settings of all layers that every kernel has."""
    nodes = {key: node for layer in layers for key, node in layer.nodes.items()}
    return Values(Schema.of(KernelConfig), nodes)


def _values(layers: list[Layer], trust: Trust) -> Values:
    """Return the settings of all layers, read with the schema of the kernel that they select."""
    common = _common(layers)
    name = "tno"
    names, place = [], ""
    for layer in layers:
        for node in layer.kernel_settings("name"):
            name, place = common.read(f"{KERNEL}.name", node), f" ({node.place})"
        names.append(name)
    named = _kernel_module(layers, common)
    if named is not None:
        named = run_kernel_module(named, trust)
    if name not in KERNEL_SCHEMAS:
        error = unknown_kernel(name)
        raise ConfigError(f"{error.reason}{place}", error.remedy)
    schema = Schema.of(KERNEL_SCHEMAS[name])
    for layer, meant in zip(layers, names, strict=True):
        # Settings of the file's kernel don't apply to another kernel that the command line selects.
        if meant == name:
            layer.add_kernel(schema)
        layer.add_former(schema)
    nodes = {key: node for layer in layers for key, node in layer.nodes.items()}
    nodes[f"{KERNEL}.name"] = stored(escaped(name), "")
    if named is not None:
        nodes[f"{KERNEL}.module"] = stored(escaped(named.module), named.place)
        nodes[f"{KERNEL}.module_sha256"] = stored(named.sha256, named.place)
    return Values(schema, nodes)


def _kernel_module(layers: list[Layer], common: Values) -> Named | None:
    """Return the kernel module that the layers name, if any."""
    named, sha256 = None, None
    for layer in layers:
        for node in layer.kernel_settings("module"):
            module, own = common.read(f"{KERNEL}.module", node), node.origin in (Origin.WORD, Origin.FILE)
            if module is None:
                continue
            if named is not None and named.own and named.module != module:
                sha256 = None  # of the module in the user's file, which another one replaces
            named = Named(module, own, None, node.place)
        for node in layer.kernel_settings("module_sha256"):
            sha256 = common.read(f"{KERNEL}.module_sha256", node)
    return None if named is None else named._replace(sha256=sha256)


def _config(values: Values, trust: Trust) -> Config:
    """Return the configuration with the given values, after all checks."""
    for key, node in values.nodes.items():
        value = values[key]
        try:
            _check_given(key, value, values.schema.settings[key], node.origin)
        except ConfigError as error:
            raise ConfigError(f"{error.reason} ({node.place})", error.remedy) from None
    config: Config = _build(Config, "", values)
    if trust.code:
        _trust_components(config)
    check_settings(config)

    def where(key: str) -> str:
        return f" ({values.nodes[key].place})" if key in values.nodes else ""

    check_schedule(config, where)
    check_tokens(config, where)
    check_protocol(config, where)
    check_format(config, where)
    check_context(config, where)
    check_sharding(config, where)
    check_averaging(config, where)
    check_muon(config, where)
    check_initial(config, where)
    settle_task(config, where)
    return config


def _trust_components(config: Config) -> None:
    """Let the classes that a run or checkpoint names be run as if the user had named them."""
    settings = config.trainer
    settings.loggers = [Component(entry) for entry in settings.loggers]
    settings.callbacks = [Component(entry) for entry in settings.callbacks]
    settings.profiler = settings.profiler and Component(settings.profiler)


def _check_given(key: str, value: Any, setting: Setting, origin: Origin) -> None:
    """Raise an error without place if a value is out of bounds, or empty where that would mean a default."""
    check_value(f"{key}={one_line(typed(value))}", value, setting.metadata)
    if key == "name":
        check_name(value)
    if origin in (Origin.WORD, Origin.FILE):
        check_not_empty(key, value, setting.hint, setting.metadata)


def _build(owner: type, prefix: str, values: Values) -> Any:
    """Return a settings dataclass; fields that no layer sets have their defaults."""
    given = {}
    for key in (*values.schema.groups, *values.schema.settings):
        group, _, name = key.rpartition(".")
        if f"{group}." * bool(group) != prefix:
            continue
        if key in values.schema.groups:
            given[name] = _build(values.schema.groups[key], f"{key}.", values)
        elif key in values.nodes:
            given[name] = values[key]
        elif values.schema.settings[key].default is MISSING:
            raise ConfigError(f"{key}: must be set")
    return owner(**given)
