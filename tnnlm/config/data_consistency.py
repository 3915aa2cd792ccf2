"""Checks of data settings that depend on one another, on the task or on the source."""

from __future__ import annotations

from collections.abc import Callable

from tnnlm.config.schema import Config, DataConfig
from tnnlm.config.sources import kind_of
from tnnlm.config.text_sources import SourceConfig
from tnnlm.config.values import one_line, typed
from tnnlm.errors import ConfigError


def check_tokens(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error if token ids are to be read and ``data.tokenizer`` is not set.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If the tokenizer is missing.
    """
    data = config.data
    if data.tokenizer is None and (data.tokens or any(part.tokens for part in data.sources)):
        raise ConfigError(
            f"data.tokens: need the tokenizer that made them{where('data.tokens') or where('data.sources')}",
            "set data.tokenizer to its tokenizer.json or its name on the Hub",
        )


def check_protocol(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error if ``data.protocol`` doesn't fit the task or the source.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If fairseq's protocol is set for another task, or for a hub data set without a
            validation split: its rows are lines, and holding out single lines would cut the text apart.
    """
    data = config.data
    if data.protocol != "fairseq":
        return
    if config.task != "causal":
        raise ConfigError(
            f"data.protocol=fairseq: is for task=causal only, not task={config.task}{where('data.protocol')}"
        )
    parts: list[tuple[str | None, SourceConfig | DataConfig]]
    parts = [(kind_of(part), part) for part in data.sources] or [(data.source, data)]
    if any(kind == "hub" and part.hub_val_split is None and not part.validation for kind, part in parts):
        raise ConfigError(
            f"data.protocol=fairseq: can't hold out lines of a hub data set{where('data.protocol')}",
            "set data.hub_val_split or data.validation",
        )


def check_format(config: Config, where: Callable[[str], str]) -> None:
    """Raise an error if ``data.format`` doesn't fit the task or the source.

    Args:
        config: Configuration.
        where: Function that returns the place where a setting was given, for the end of an error message.

    Raises:
        ConfigError: If conversations are to be read for another task, from a source without columns, or with
            settings that only text has, or if a setting of conversations is set for text.
    """
    data, plain = config.data, DataConfig()
    if data.format == "text":
        for key in ("chat_template", "packing"):
            if getattr(data, key) != getattr(plain, key):
                place = where(f"data.{key}")
                raise ConfigError(
                    f"data.{key}: is for conversations only{place}",
                    "set data.format=chat or prompt_completion too",
                )
        return
    shown, place = f"data.format={data.format}", where("data.format")
    if config.task != "causal":
        raise ConfigError(f"{shown}: is for task=causal only, not task={config.task}{place}")
    if data.source not in ("files", "hub"):
        raise ConfigError(
            f"{shown}: data.source={data.source} has no conversations{place}",
            "set data.source=files and data.files, or data.source=hub and data.hub_name",
        )
    for key in ("text_column", "protocol", "streaming", "document_separator", "tokenizer_sample"):
        if getattr(data, key) != getattr(plain, key):
            given = one_line(typed(getattr(data, key)))
            raise ConfigError(
                f"data.{key}={given}: is for data.format=text only{where(f'data.{key}')}", "omit it"
            )
    if config.trainer.context_parallel > 1:
        raise ConfigError(
            f"trainer.context_parallel={config.trainer.context_parallel}: not supported with {shown}"
            f"{where('trainer.context_parallel')}",
            "set it to 1",
        )
