"""Weighted mixture of several corpora, each prepared and cached by itself, with one tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import ConcatDataset

from tnnlm.checksums import list_files
from tnnlm.config.schema import DataConfig
from tnnlm.config.sources import kind_of
from tnnlm.config.text_sources import SourceConfig
from tnnlm.data.arrow_text import remove_scratch
from tnnlm.data.chunks import CountedText, chunks_of
from tnnlm.data.order import Share
from tnnlm.data.packing import TOKENIZER, PackedCorpus, PackedRows, prepare
from tnnlm.data.prepared import open_prepared, write_meta
from tnnlm.data.report import DataReport, SplitInfo
from tnnlm.data.sources import cache_folder, load_corpus, source_fingerprint
from tnnlm.data.stored_texts import characters_of, documents_of
from tnnlm.data.waiting import prepare_once
from tnnlm.errors import DataError
from tnnlm.files import atomic_folder, write_text
from tnnlm.tokenizer import TextTokenizer, check_trainable, train_bpe

Result = TypeVar("Result")


@dataclass(frozen=True)
class MixedCorpus:
    """Corpora with weights."""

    parts: list[PackedCorpus]
    weights: list[float]
    """Weight of each corpus, positive."""
    report: DataReport
    """Report of all corpora, with the sums of their sizes."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """Tokenizer of all corpora."""
        return self.parts[0].tokenizer

    @property
    def train(self) -> SplitInfo:
        """Sizes of the training splits."""
        return self.report.splits["train"]

    @property
    def val(self) -> SplitInfo:
        """Sizes of the validation splits."""
        return self.report.splits["val"]

    def rows(self, split: str, length: int, max_tokens: int | None = None) -> MixedRows:
        """Return the rows of a split of all corpora, one after another.

        Args:
            split: Name of the split, "train" or "val".
            length: Number of input tokens per row.
            max_tokens: Maximum number of input tokens of all corpora, divided by their weights, but at least
                a row of each.
        """
        total = sum(self.weights)
        return MixedRows(
            [
                part.rows(
                    split,
                    length,
                    None if max_tokens is None else max(length, int(max_tokens * weight / total)),
                )
                for part, weight in zip(self.parts, self.weights, strict=True)
            ]
        )

    def shares(self, rows: MixedRows) -> list[Share]:
        """Return the number of rows and the weight of each corpus.

        Raises:
            DataError: If a corpus has less text than a row.
        """
        for name, part, found in zip(self.report.mixture, self.parts, rows.parts, strict=True):
            if not len(found):
                raise DataError(
                    f"data.sources: {name} has {part.train.tokens} training tokens, where one row of "
                    f"{found.length} needs {found.length + 1}",
                    "add text to it, or remove it",
                )
        sizes = zip(rows.parts, self.weights, strict=True)
        return [Share(len(part), weight) for part, weight in sizes]


class MixedRows(ConcatDataset[torch.Tensor]):
    """Map-style data set of the token rows (L + 1,) of several corpora, one corpus after another."""

    def __init__(self, parts: Sequence[PackedRows]) -> None:
        super().__init__(parts)
        self.parts = [*parts]
        self.length = parts[0].length
        """Number L of input tokens of a row."""


def open_text_corpus(
    config: DataConfig, vocab_size: int, seed: int, resumable: bool = False
) -> PackedCorpus | MixedCorpus:
    """Prepare the corpus or the mixture of corpora of a run, or load it from the cache.

    The arguments and exceptions are those of :func:`~tnnlm.data.packing.prepare`.
    """
    if config.source != "mixture":
        return prepare(config, vocab_size, seed, resumable)
    parts = [part_config(config, source) for source in config.sources]
    weights = [source.weight for source in config.sources]
    if config.tokenizer is None:
        tokenizer = _trained(parts, weights, vocab_size, seed)
        parts = [replace(part, tokenizer=str(tokenizer)) for part in parts]
    corpora = [
        _of_source(number, prepare, part, vocab_size, seed, resumable) for number, part in enumerate(parts, 1)
    ]
    return MixedCorpus(corpora, weights, _report(corpora, config.sources))


def _of_source(number: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a function of a source returns; its errors about a setting of the source name the source.

    Raises:
        DataError: If the function does.
    """
    try:
        return function(*arguments)
    except DataError as error:
        settings = "|".join(item.name for item in fields(SourceConfig))
        found = re.compile(rf"data(?=: |\.(?:{settings})[=:])").match(error.reason)
        if found is None:
            raise
        raise DataError(f"data.sources[{number}]{error.reason[found.end() :]}", error.remedy) from None


def part_config(config: DataConfig, source: SourceConfig) -> DataConfig:
    """Return the data settings of one source of a mixture."""
    own = {item.name for item in fields(source)} & {item.name for item in fields(config)} - {"source"}
    kind = kind_of(source)
    assert kind is not None  # checked by the configuration loader
    return replace(config, source=kind, sources=[], **{name: getattr(source, name) for name in own})


def _trained(parts: Sequence[DataConfig], weights: Sequence[float], vocab_size: int, seed: int) -> Path:
    """Return the path of a tokenizer that is trained on the training splits of all sources."""
    first = parts[0]
    check_trainable(first.eos_token, first.mask_token)
    key = (
        "tokenizer of a mixture",
        [_of_source(number, source_fingerprint, part) for number, part in enumerate(parts, 1)],
        [*weights],
        (vocab_size, seed, first.eos_token, first.mask_token, first.protocol),
        (first.val_fraction, first.tokenizer_sample),
    )
    folder = cache_folder(first) / hashlib.sha256(repr(key).encode()).hexdigest()[:32]

    def build() -> None:
        with atomic_folder(folder, replace=False) as temporary:
            texts = [
                _of_source(number, load_corpus, part, seed, temporary / str(number)).train
                for number, part in enumerate(parts, 1)
            ]
            samples = [
                CountedText(chunks_of(documents_of(text)), _share_of(text, weight / sum(weights), first))
                for text, weight in zip(texts, weights, strict=True)
            ]
            tokenizer = train_bpe(
                itertools.chain(*samples),
                vocab_size,
                first.eos_token,
                sum(map(len, texts)),
                False,
                first.mask_token,
            )
            for number in range(1, len(parts) + 1):
                remove_scratch(temporary / str(number))
                (temporary / str(number)).rmdir()
            write_text(temporary / TOKENIZER, tokenizer.to_json())
            write_meta(temporary, folder.name, {}, list_files(temporary, [TOKENIZER]))

    prepare_once(folder, build)
    return open_prepared(folder, lambda meta: folder / TOKENIZER)


def _share_of(texts: Sequence[str], share: float, config: DataConfig) -> float:
    """Return the share of a source's text that the tokenizer is trained on."""
    return min(1.0, config.tokenizer_sample * share / max(1, characters_of(texts)))


def _report(corpora: Sequence[PackedCorpus], sources: Sequence[SourceConfig]) -> DataReport:
    reports = [corpus.report for corpus in corpora]
    total = sum(source.weight for source in sources)
    names: list[str] = []
    for number, (source, report) in enumerate(zip(sources, reports, strict=True), 1):
        name = source.name or _name_of(source, report)
        names.append(f"{name} ({number})" if name in names else name)
    sums: dict[str, Any] = {
        name: sum(getattr(report, name) for report in reports)
        for name in ("files", "documents", "duplicates", "shared", "checked", "unknown", "changed")
    }
    counts: dict[str, Any] = {
        name: dict(sum((Counter(getattr(report, name)) for report in reports), Counter[str]()))
        for name in ("dropped", "normalized", "encodings")
    }
    return DataReport(
        source="mixture",
        eos_token=reports[0].eos_token,
        protocol=reports[0].protocol,
        without_text=[name for report in reports for name in report.without_text],
        splits={name: _sum([report.splits[name] for report in reports]) for name in ("train", "val")},
        mixture={
            name: [source.weight / total, report.splits["train"].tokens]
            for name, source, report in zip(names, sources, reports, strict=True)
        },
        **sums,
        **counts,
    )


def _name_of(source: SourceConfig, report: DataReport) -> str:
    named = [*source.files, *source.tokens]
    return Path(named[0]).name if named else report.source


def _sum(infos: Sequence[SplitInfo]) -> SplitInfo:
    sha256 = hashlib.sha256("".join(info.sha256 for info in infos).encode()).hexdigest()
    documents, tokens, n_bytes = (
        sum(getattr(info, name) for info in infos) for name in ("documents", "tokens", "bytes")
    )
    words = sum(info.words for info in infos) if all(info.words for info in infos) else 0
    return SplitInfo(documents, tokens, n_bytes, sha256, words)
