"""Settings of one source of a mixture."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnnlm.fields import choice, number

TOKEN_TYPES = ("uint16", "uint32", "int32", "int64")
"""Types of the token ids of a .bin file without an index."""


@dataclass(kw_only=True)
class SourceConfig:
    """Source of a mixture. The settings of ``data`` that it lacks are the same for all sources."""

    weight: float = number(1.0, above=0, high=1e9)
    """Weight of the source: its share of the training rows is its weight divided by the sum of all."""
    name: str | None = None
    """Name in the report (null: that of the first file, or of the data set)."""
    source: str = choice("auto", "auto", "stdlib", "files", "hub", "tokens")
    """Kind of the source, see ``data.source``; auto: that of ``files``, ``hub_name`` or ``tokens``."""
    files: list[str] = field(default_factory=list)
    """See ``data.files``."""
    validation: list[str] = field(default_factory=list)
    """See ``data.validation``."""
    document_separator: str | None = None
    """See ``data.document_separator``."""
    text_column: str = "text"
    """See ``data.text_column``."""
    hub_name: str | None = None
    """See ``data.hub_name``."""
    hub_config: str | None = None
    """See ``data.hub_config``."""
    hub_split: str = "train"
    """See ``data.hub_split``."""
    hub_val_split: str | None = None
    """See ``data.hub_val_split``."""
    streaming: bool = False
    """See ``data.streaming``."""
    max_documents: int | None = number(None, low=2)
    """See ``data.max_documents``."""
    tokens: list[str] = field(default_factory=list)
    """See ``data.tokens``."""
    token_type: str = choice("uint16", *TOKEN_TYPES)
    """See ``data.token_type``."""
