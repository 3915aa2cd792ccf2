"""Metadata of a model card, by which the Hugging Face Hub lists and filters models, and what users state.

The entries are those of :class:`huggingface_hub.ModelCardData`. What is not known is omitted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.config.schema import Config, DataConfig
from tnnlm.config.sources import kind_of
from tnnlm.config.text_sources import SourceConfig
from tnnlm.errors import UserError

FORMS = {"parallel": "parallel form", "recurrent": "recurrent form"}
"""Names of the parallel and the recurrent form, whose perplexities are evaluation results."""
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Stated:
    """Statements of the user for a model card, which are neither measured nor in the settings."""

    license: str | None = None
    """License identifier of the Hub, such as ``apache-2.0``."""
    languages: list[str] = field(default_factory=list)
    """Languages as codes of ISO 639, such as ``en``; also ``code`` and ``multilingual``."""
    datasets: list[str] = field(default_factory=list)
    """Names of data sets on the Hub."""

    def check(self) -> None:
        """Check the languages and the names of data sets.

        Raises:
            UserError: If a language is no code, or a data set no name on the Hub.
        """
        for language in self.languages:
            if not _LANGUAGE.fullmatch(language):
                raise UserError(f"language {language}: is no code of a language", "give one such as en or zh")
        for name in self.datasets:
            if not _REPOSITORY.fullmatch(name):
                raise UserError(f"dataset {name}: is no name of a data set on the Hub", "give OWNER/NAME")


NOTHING_STATED = Stated()


def card_metadata(
    config: Config, trained: bool, report: ModelReport, stated: Stated, base: str | None
) -> ModelCardData:
    """Return the metadata of a model card.

    Args:
        config: Configuration of the run.
        trained: Whether the run trained the model on its data; imported weights were trained elsewhere.
        report: Report of the conversion, with perplexities if they were measured.
        stated: Statements of the user.
        base: Name on the Hub of the model that the training started from, if there is one.
    """
    datasets = [*stated.datasets, *(public_data(config.data) if trained else [])]
    results = _results(config.data, report) if trained else []
    return ModelCardData(
        license=line(stated.license) if stated.license else None,
        language=stated.languages or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=line(base) if base else None,
        tags=["tnnlm", line(config.model.kernel.name), "long-convolution", "recurrent"],
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=line(config.name) if results else None,
        eval_results=results or None,
    )


def _results(data: DataConfig, report: ModelReport) -> list[EvalResult]:
    """Return the measured perplexities of both forms at each length."""
    public = public_data(data)
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=public[0] if len(public) == 1 else data.source,
            dataset_name=", ".join(map(line, data_names(data))) or "sources of Python's standard library",
            dataset_config=data.hub_config if data.source == "hub" else None,
            dataset_split=data.hub_val_split if data.source == "hub" and data.hub_val_split else "held out",
            metric_type="perplexity",
            metric_name=f"perplexity per token, {name}, context of {int(length):,} tokens",
            metric_value=value,
        )
        for form, name in FORMS.items()
        for length, value in report.ppl.get(form, {}).items()
        if math.isfinite(value)
    ]


def line(text: str) -> str:
    """Join the lines of a user's string, because a second line could be a heading or end the metadata."""
    return " ".join(text.split())


def public_data(data: DataConfig | SourceConfig) -> list[str]:
    """Return the names of the data sets of the Hub that a run reads."""
    if isinstance(data, DataConfig) and data.source == "mixture":
        return [name for part in data.sources for name in public_data(part)]
    kind = kind_of(data) if isinstance(data, SourceConfig) else data.source
    name = data.hub_name
    return [line(name)] if kind == "hub" and name and not is_local(name) else []


def data_names(data: DataConfig | SourceConfig) -> list[str]:
    """Return the names of the data files, or of the data set with its configuration and split."""
    if isinstance(data, DataConfig) and data.source == "mixture":
        return [name for part in data.sources if part.source != "stdlib" for name in data_names(part)]
    kind = kind_of(data) if isinstance(data, SourceConfig) else data.source
    if kind in ("files", "tokens"):
        return [Path(name).name for name in (data.files if kind == "files" else data.tokens)]
    if kind == "stdlib":
        return []
    hub_name = data.hub_name or ""
    shown = Path(hub_name).name if is_local(hub_name) else hub_name
    return [part for part in (shown, data.hub_config or "", f"split {data.hub_split}") if part]


def is_local(name: str) -> bool:
    """Return whether a name is a local path, which the card must not disclose."""
    return name.startswith(("/", ".", "~")) or Path(name).exists()
