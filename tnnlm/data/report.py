"""Report of what was read: printed, stored with the prepared data and with the run, checked on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tnnlm.data.text import count, shown
from tnnlm.errors import DataError
from tnnlm.files import write_text
from tnnlm.reading import read_json

REPORT = "data.json"
"""Name of the report in the folder of a run."""
LOSSY = 1e-3
"""Largest share of characters that a tokenizer may lose for which bits per byte are still reported: single
characters that it normalises hardly change them."""


@dataclass(frozen=True)
class SplitInfo:
    """Number of documents, tokens and UTF-8 bytes in a split."""

    documents: int
    tokens: int
    bytes: int
    sha256: str = ""
    """Hash of the documents in their order."""
    words: int = 0
    """Number of words, separated by white space, and of line ends; 0 in data of a version without it."""

    @property
    def tokens_per_word(self) -> float | None:
        """Predicted tokens per word, or None if the words are unknown; the first token is not predicted."""
        return (self.tokens - 1) / self.words if self.words else None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; eos tokens count as tokens."""
        return self.bytes / self.tokens


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Report of a data set. For task=classify, its documents are labelled sequences."""

    source: str = ""
    """``data.source``, or the name of a hub data set."""
    revision: str = ""
    """Commit of a hub data set, where it is known."""
    unit: str = "document"
    files: int = 0
    """Number of files; 0 for data sets of the hub and generated data."""
    documents: int = 0
    """Number of documents of all splits. If few documents are each cut in two, they are counted once."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that were not used, by reason."""
    normalized: dict[str, int] = field(default_factory=dict)
    """Characters that were changed or removed, by kind."""
    encodings: dict[str, int] = field(default_factory=dict)
    """Files that are not UTF-8, by encoding."""
    duplicates: int = 0
    """Documents that equal an earlier one. They are kept."""
    shared: int = 0
    """Validation or test documents that equal a training document, which only published splits contain."""
    without_text: list[str] = field(default_factory=list)
    """Names of files that contain no document."""
    sampled: int = 0
    """Characters that the tokenizer was trained on, if they are a sample of the training split; else 0."""
    checked: int = 0
    """Sampled characters that the tokenizer was checked with; 0 for one that was trained on this data."""
    unknown: int = 0
    """Sampled characters that the tokenizer replaces by its unknown token, or drops."""
    changed: int = 0
    """Other sampled characters that differ in the decoded tokens, such as capitals and line ends."""
    eos_token: str = ""
    protocol: str = "documents"
    """``data.protocol``: where end tokens are, and which tokens are scored."""
    answers: dict[str, int] = field(default_factory=dict)
    """Number of scored tokens of each split, for conversations; otherwise empty."""
    cut: int = 0
    """Conversations of which only the first ``model.max_length`` tokens are read."""
    skipped: int = 0
    """Conversations that have no answer in these tokens, and are not used."""
    unended: int = 0
    """Conversations whose answers have no end token, so that generation does not end by itself."""
    packed: bool = False
    """``data.packing``: whether rows are cut from the stream of all conversations."""
    prompts: list[str] = field(default_factory=list)
    """Short prompts from the text, see :func:`tnnlm.data.prompts.sample_prompts`."""
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    mixture: dict[str, list[float]] = field(default_factory=dict)
    """Share of the training rows, and number of training tokens, of each source of a mixture by name."""

    @property
    def lossy(self) -> bool:
        """Whether the text can't be recovered from the tokens, so that bits per byte would mislead."""
        return self.unknown + self.changed > LOSSY * self.checked

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> DataReport:
        """Return the report that :meth:`to_dict` returned; entries of later versions are ignored."""
        known = {key: found[key] for key in cls.__dataclass_fields__ if key in found}
        names = SplitInfo.__dataclass_fields__
        splits = {
            split: SplitInfo(**{key: info[key] for key in names if key in info})
            for split, info in found.get("splits", {}).items()
        }
        return cls(**{**known, "splits": splits})

    def lines(self) -> Iterator[str]:
        """Yield the report as lines of text: what was read, the splits and their protocol, and warnings."""
        read = [count(self.files, "file")] if self.files else []
        read.append(count(self.documents, self.unit))
        if self.duplicates:
            read.append(count(self.duplicates, "duplicate"))
        place = f"{self.source} at {self.revision[:12]}" if self.revision else self.source
        facts = [", ".join(read)]
        for what, counts in (("dropped", self.dropped), ("normalized", self.normalized)):
            if counts:
                facts.append(f"{what} {shown((kind, n) for kind, n in counts.items())}")
        if self.encodings:
            facts.append("not UTF-8: " + shown((f"in {name}", n) for name, n in self.encodings.items()))
        yield f"data: {'' if self.source == 'files' else place + ': '}{'; '.join(facts)}"
        yield "; ".join(
            f"{name}: {count(info.documents, self.unit)}, {count(info.tokens, 'token')}"
            for name, info in self.splits.items()
        )
        for name, (share, tokens) in self.mixture.items():
            yield f"{name}: {share:.1%} of the training rows, from {count(int(tokens), 'token')}"
        if self.sampled:
            yield f"tokenizer: trained on a sample of {count(self.sampled, 'character')}"
        if self.answers:
            parts = (f"{name}: {number:,}" for name, number in self.answers.items())
            rows = ", rows are cut from the stream of all (data.packing)" if self.packed else ""
            yield f"answer tokens, the only scored ones: {', '.join(parts)}{rows}"
        if self.cut or self.skipped:
            cut, skipped = (count(number, self.unit) for number in (self.cut, self.skipped))
            yield f"over model.max_length: {cut} cut, {skipped} skipped, without an answer before the cut"
        if self.unended:
            yield (
                f"warning: {count(self.unended, self.unit)} without an end token in an answer; "
                "write {{ eos_token }} in the chat template, or answers may not end"
            )
        if self.protocol == "fairseq":
            yield "protocol fairseq: an end token per line, every validation token is scored"
        if self.without_text:
            yield f"warning: {', '.join(self.without_text)}: contains no text, skipped"
        if self.unknown or self.changed:
            consequence = "; val/bpb is not reported, because the text can't be recovered from the tokens"
            yield (
                f"warning: of {self.checked:,} sampled characters, {self.unknown:,} are unknown to the "
                f"tokenizer and {self.changed:,} others changed by it{consequence if self.lossy else ''}"
            )
        if self.shared:
            yield f"warning: {count(self.shared, self.unit)} of other splits equal training {self.unit}s"

    def change(self, now: DataReport) -> str | None:
        """Return how ``now`` differs from this report in content, or None if a run can continue with it.

        Only what is trained and validated on counts; names, paths and times of files don't.
        """
        for name, before in self.splits.items():
            after = now.splits.get(name)
            if after is not None and after.sha256 == before.sha256:
                continue
            if after is None:
                return f"there is no {name} split"
            sizes = [
                f"{count(info.documents, self.unit)} of {info.bytes:,} bytes" for info in (before, after)
            ]
            was = (
                "other content of the same size"
                if sizes[0] == sizes[1]
                else f"{sizes[1]} instead of {sizes[0]}"
            )
            return f"the {name} split has {was}"
        shares, old = ([share for share, _ in found.mixture.values()] for found in (now, self))
        if shares != old:
            return f"the shares of its sources are {_percent(shares)} instead of {_percent(old)}"
        if now.protocol != self.protocol:
            return f"data.protocol is {now.protocol} instead of {self.protocol}"
        if now.packed != self.packed:
            return f"data.packing is {now.packed} instead of {self.packed}".lower()
        if now.eos_token != self.eos_token:
            return f"data.eos_token is {now.eos_token!r} instead of {self.eos_token!r}"
        return None


def _percent(shares: list[float]) -> str:
    return ", ".join(f"{share:.2%}" for share in shares) or "not given"


def write_report(run: Path, report: DataReport) -> None:
    """Write the report of the data to the folder of a run."""
    write_text(run / REPORT, json.dumps(report.to_dict(), indent=2) + "\n")


def read_report(run: Path) -> DataReport | None:
    """Return the report in the folder of a run; None for a run of a version without it.

    Raises:
        DataError: If the file is damaged.
    """
    path = run / REPORT
    if not os.path.lexists(path):
        return None
    remedy = "restore it, or remove it to skip this check"
    found = read_json(path, remedy, DataError)
    try:
        report = DataReport.from_dict(found)
        if not report.splits or any(not isinstance(info.tokens, int) for info in report.splits.values()):
            raise ValueError
        return report
    except (ValueError, TypeError, AttributeError):
        raise DataError(f"{path}: is damaged (no report of a data set)", remedy) from None
