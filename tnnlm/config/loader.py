"""Loading of a checked ``Config`` from defaults, a YAML file and overrides, and its conversion to plain data.

The YAML file overrides the defaults, and ``key=value`` arguments override both. Unknown keys, wrong types and
values out of bounds raise ``ConfigError`` with the key. OmegaConf objects are not used outside this module.
"""

from __future__ import annotations

import difflib
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tnnlm.config.checks import check_settings, check_value, leaves
from tnnlm.config.schema import (
    LABELLED,
    MASK_TOKEN,
    SMALLEST_MASKED,
    SMALLEST_TEXT,
    Config,
    DataConfig,
    ModelConfig,
)
from tnnlm.errors import ConfigError
from tnnlm.kernels import KERNEL_SCHEMAS, KernelConfig
from tnnlm.kernels.base import unknown_kernel

_OWNERS = {"files": "files", "hub": "hub_", "listops": "listops", "lra": "lra"}
"""Values of ``data.source``, each with the prefix of the settings that only this source uses."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration.

    Args:
        path: YAML file; None uses the defaults only.
        overrides: Overrides such as ``optim.lr=1e-3``.

    Raises:
        ConfigError: If the file is missing or unreadable, or a key or value is invalid.
    """
    layers = [] if path is None else [(_read_yaml(Path(path)), str(path))]
    layers.append((_read_overrides(overrides), "command line"))
    config = _merge(layers)
    for layer, where in reversed(layers):
        if OmegaConf.select(layer, "data.source") is not None:
            break  # The source was chosen explicitly: settings of other sources may be present.
        _check_source(layer, config.data.source, where)
    return config


def config_from_dict(data: dict[str, Any], where: str = "checkpoint") -> Config:
    """Return the configuration that :func:`config_to_dict` stored; errors report ``where`` as its origin."""
    return _merge([(_as_dict_config(data, where), where)])


def model_config_from_dict(data: dict[str, Any], where: str = "checkpoint") -> ModelConfig:
    """Return the ``model`` group alone, as stored in converted models.

    Only the name and module of the kernel are kept: a converted model has no kernel, and the module that
    registers it may not be installed.
    """
    kernel = data["kernel"]
    rest = {key: value for key, value in data.items() if key != "kernel"}
    config = config_from_dict({"model": rest}, where).model
    config.kernel = KernelConfig(name=str(kernel["name"]), module=kernel.get("module"))
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists, numbers and strings, as stored in checkpoints."""
    return asdict(config)


def config_to_yaml(config: Config) -> str:
    """Return the complete configuration as YAML, including defaults."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def _merge(layers: list[tuple[DictConfig, str]]) -> Config:
    try:
        return _merged(layers)
    except OmegaConfBaseException as error:  # For example an interpolation, ${...}, that can't be resolved.
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from None


def _merged(layers: list[tuple[DictConfig, str]]) -> Config:
    schema = OmegaConf.structured(Config)
    name, module = "tno", None
    names = []
    for layer, where in layers:
        name = _kernel_setting(layer, "name", where) or name
        module = _kernel_setting(layer, "module", where) or module
        names.append(name)
    # Settings of the file's kernel don't apply to another kernel that the command line selects.
    for (layer, _), meant in zip(layers, names, strict=True):
        if meant != name and "model" in layer:
            layer.model.pop("kernel", None)
    if module is not None:
        _import_kernel(module)
    if name not in KERNEL_SCHEMAS:
        raise unknown_kernel(name)
    schema.model.kernel = OmegaConf.structured(KERNEL_SCHEMAS[name])
    for layer, where in layers:
        _check_keys(layer, schema, "", where)
        try:
            schema.merge_with(layer)
        except OmegaConfBaseException as error:
            key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
            raise ConfigError(f"{key}{str(error).splitlines()[0]} ({where})") from None
    config = cast(Config, OmegaConf.to_object(schema))
    check_settings(config)
    _settle_task(config)
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError(f"name={config.name!r}: must be a single folder name")
    return config


def _settle_task(config: Config) -> None:
    """Raise an error for settings that the task doesn't have, and set defaults that depend on the task."""
    if config.task == "causal" and config.model.causal is False:
        raise ConfigError(
            "model.causal=false: task=causal predicts the next token and must not see it",
            "omit model.causal, or set task=masked",
        )
    data = config.data
    labelled = data.source in LABELLED
    if labelled != (config.task == "classify"):
        instead = "set task=classify" if labelled else f"set data.source={' or '.join(LABELLED)}"
        raise ConfigError(f"data.source={data.source}: can't be used with task={config.task}", instead)
    if not labelled:
        size = config.model.vocab_size
        check_value(f"model.vocab_size={size}", size, {"low": SMALLEST_TEXT})
    if config.task == "masked":
        data.mask_token = data.mask_token or MASK_TOKEN
        if data.mask_token == data.eos_token:
            raise ConfigError(
                f"data.mask_token={data.mask_token}: is the same as data.eos_token", "set another token"
            )
        if data.tokenizer is None and config.model.vocab_size < SMALLEST_MASKED:
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size}: must be at least {SMALLEST_MASKED} for "
                "task=masked: every byte, an end token and a mask token"
            )
    elif data.mask_token is not None:
        raise ConfigError(
            f"data.mask_token={data.mask_token}: is for task=masked only, not task={config.task}"
        )


def _check_source(layer: DictConfig, source: str, where: str) -> None:
    """Raise an error for settings of a source that is not selected: the run would silently use other data."""
    defaults = config_to_dict(DataConfig())
    group = layer.get("data")
    given = cast(dict[str, Any], OmegaConf.to_container(group)) if group else {}
    for key, value in given.items():
        owner = next((own for own, prefix in _OWNERS.items() if key.startswith(prefix)), source)
        if owner != source and value != defaults[key]:
            raise ConfigError(
                f"data.{key}: is not used with data.source={source} ({where})", f"set data.source={owner} too"
            )


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        data = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ConfigError(f"{path}: not a readable YAML file: {str(error).splitlines()[0]}") from None
    return _as_dict_config(data, str(path))


def _read_overrides(words: Sequence[str]) -> DictConfig:
    for word in words:
        if "=" not in word or word.startswith("="):
            raise ConfigError(f"{word}: expected key=value, for example optim.lr=1e-3")
    try:
        return _as_dict_config(OmegaConf.from_dotlist(list(words)), "command line")
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(words)}: {str(error).splitlines()[0]}") from None


def _as_dict_config(data: Any, where: str) -> DictConfig:
    node = data if isinstance(data, DictConfig) else OmegaConf.create(data)
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{where}: expected a mapping of settings, such as 'model:' and 'data:'")
    group = node.get("data")
    if isinstance(group, DictConfig) and isinstance(group.get("files"), str):
        group.files = [group.files]
    return node


def _import_kernel(module: str) -> None:
    """Import the user's file or module that registers a kernel; a file is executed only once."""
    name = module
    try:
        if module.endswith(".py"):
            path = Path(module).resolve()
            name = f"tnnlm_kernel_{path.stem}_{zlib.crc32(bytes(path)):08x}"
            if name in sys.modules:
                return
            spec = spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            loaded = module_from_spec(spec)
            # Registered before it is executed, because dataclasses look up their module.
            sys.modules[name] = loaded
            spec.loader.exec_module(loaded)
        else:
            import_module(module)
    except Exception as error:  # The user's file may raise anything.
        sys.modules.pop(name, None)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(f"model.kernel.module={module}: can't be imported ({reason})") from error


def _kernel_setting(layer: DictConfig, setting: str, where: str) -> str | None:
    node: Any = layer
    for key in ("model", "model.kernel"):
        node = node.get(key.rpartition(".")[2])
        if node is None:
            return None
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{key}={node}: expected a group of settings, {key}.NAME=... ({where})")
    value = node.get(setting)
    return None if value is None else str(value)


def _check_keys(layer: DictConfig, schema: DictConfig, prefix: str, where: str) -> None:
    for key in map(str, layer):
        full = f"{prefix}{key}"
        if key not in schema:
            raise ConfigError(
                f"{full}: unknown key ({where})", f"did you mean {_nearest(full, schema, prefix)}?"
            )
        inner = schema._get_node(str(key))
        value = layer._get_node(key)
        if isinstance(inner, DictConfig):
            if not isinstance(value, DictConfig):
                raise ConfigError(f"{full}: expected a group of settings, {full}.NAME=... ({where})")
            _check_keys(value, inner, f"{full}.", where)
        elif isinstance(inner, ListConfig) and not isinstance(value, ListConfig):
            raise ConfigError(f"{full}: expected a list, {full}=[a,b] ({where})")


def _nearest(key: str, schema: DictConfig, prefix: str) -> str:
    siblings = [f"{prefix}{name}" for name in map(str, schema)]
    everywhere = [name for name, _, _ in leaves(Config())]
    same_leaf = [name for name in everywhere if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
    return (close or same_leaf or difflib.get_close_matches(key, everywhere + siblings, n=1, cutoff=0))[0]
