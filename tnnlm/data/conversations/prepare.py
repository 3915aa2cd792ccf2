"""Tokenized conversations, cached by a hash of source, split, template and tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tnnlm.chat.encoding import SpecialTokens
from tnnlm.chat.renderer import Renderer
from tnnlm.chat.stored import stored_template
from tnnlm.chat.templates import PLAIN, RAW, AnsweredText, ChatTemplate, named_template
from tnnlm.checksums import list_files
from tnnlm.config.schema import Config, DataConfig
from tnnlm.data.conversations.examples import Example
from tnnlm.data.conversations.rows import AnswerRows, PaddedRows, stored_files, write_conversations
from tnnlm.data.conversations.survey import Found, select, survey
from tnnlm.data.prepared import is_prepared, open_prepared, write_meta
from tnnlm.data.report import DataReport, SplitInfo
from tnnlm.data.sources import cache_folder, source_fingerprint
from tnnlm.data.text import TextHash
from tnnlm.data.token_files import Layout
from tnnlm.data.waiting import prepare_once
from tnnlm.errors import DataError
from tnnlm.files import atomic_folder, remove_leftovers, write_text
from tnnlm.tokenizer import TextTokenizer, check_trainable, load_tokenizer, train_bpe

VERSION = 1
"""Version in the cache key; increment it whenever the tokens or their files change."""
BATCH = 512
"""Number of conversations that are encoded at once."""
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ConversationCorpus:
    """Tokenized conversations on disk."""

    folder: Path
    tokenizer: TextTokenizer
    """Tokenizer with the chat template."""
    report: DataReport
    layout: Layout
    length: int
    """Training length in tokens."""

    def answers(self, split: str, length: int, packed: bool = False) -> AnswerRows:
        """Return the rows of a split; arguments are those of :class:`AnswerRows`."""
        return AnswerRows(self.folder, split, self.layout, length, packed)

    def rows(self, split: str, length: int, max_tokens: int | None = None) -> PaddedRows:
        """Return the rows of a split, padded to ``length``.

        Args:
            split: Name of the split, "train" or "val".
            length: Number of input tokens per row. Beyond the training length, the rows are the conversations
                that are longer than that.
            max_tokens: Maximum number of input tokens; None for the whole split.
        """
        longer_than = self.length if length > self.length else 0
        return PaddedRows(self.answers(split, length).by_length(max_tokens, longer_than), length)


@dataclass(frozen=True)
class _Request:
    """Everything that decides the tokens of the conversations."""

    config: DataConfig
    vocab_size: int
    seed: int
    given: TextTokenizer | None
    """Tokenizer; None to train one of ``vocab_size`` tokens."""
    template: str | None
    """Template; None for the one that suits the rows."""

    def folder(self) -> Path:
        """Return the folder of the cache."""
        config = self.config
        parts = (
            f"conversations {VERSION}",
            source_fingerprint(config),
            config.format,
            self.template,
            None if self.given is None else self.given.chat_template,
            config.val_fraction,
            self.seed,
            config.eos_token,
            self.given.fingerprint if self.given else f"bpe {self.vocab_size}",
        )
        return cache_folder(config) / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class _Written(NamedTuple):
    """Sizes of a split."""

    info: SplitInfo
    answers: int
    """Number of conversations with an answer."""
    unended: int
    """Number of conversations without an end token in an answer."""


def prepare_conversations(settings: Config) -> ConversationCorpus:
    """Tokenize the conversations, or load them from the cache.

    Args:
        settings: Configuration. If it gives no tokenizer, one with ``model.vocab_size`` entries is trained.

    Raises:
        DataError: If the data, the tokenizer or the template is unusable. The cache is then unchanged.
    """
    config, vocab_size = settings.data, settings.model.vocab_size
    given = load_tokenizer(config.tokenizer, config.eos_token) if config.tokenizer else None
    if given is not None and given.size > vocab_size:
        raise DataError(
            f"{config.tokenizer}: has {given.size} tokens, the model only {vocab_size}",
            f"set model.vocab_size={given.size} or more",
        )
    if given is None:
        check_trainable(config.eos_token)
    else:
        path = Path(str(config.tokenizer))  # or a name on the Hub, which is no path
        given.chat_template = stored_template(path.parent) if path.is_file() else None
    template = None if config.chat_template is None else named_template(config.chat_template)
    request = _Request(config, vocab_size, settings.seed, given, template)
    folder = request.folder()
    remove_leftovers(folder.parent)
    if not is_prepared(folder):
        prepare_once(folder, lambda: _build(request, folder))
    corpus = _open(folder, config.eos_token, settings.model.max_length)
    return replace(corpus, report=replace(corpus.report, packed=config.packing))


def _open(folder: Path, eos_token: str, length: int) -> ConversationCorpus:
    def opened(meta: dict[str, Any]) -> ConversationCorpus:
        path = folder / _TOKENIZER
        tokenizer = TextTokenizer.from_json(path.read_text(encoding="utf-8"), eos_token, str(path))
        tokenizer.chat_template = meta["template"]
        report, layout = DataReport.from_dict(meta), Layout(*meta["layout"])
        return ConversationCorpus(folder, tokenizer, report, layout, length)

    return open_prepared(folder, opened)


def _build(request: _Request, folder: Path) -> None:
    """Write the folder of the cache; nothing is left if that fails."""
    config = request.config
    with atomic_folder(folder, replace=False) as temporary, Renderer() as renderer:
        found, held_out = survey(config, request.seed)
        train = found.hashes[~held_out]
        template = _suitable(request, found) if request.template is None else request.template
        tokenizer = request.given or _trained(request, select(config, ~held_out))
        chat = ChatTemplate(template, SpecialTokens(tokenizer), renderer)
        layout = Layout.of(tokenizer.size)
        written = {
            split: _write(chat, select(config, chosen), temporary, split, layout)
            for split, chosen in (("train", ~held_out), ("val", held_out))
        }
        if not all(split.answers for split in written.values()):
            name = "" if config.chat_template is None else f"={config.chat_template}"
            raise DataError(
                f"data.chat_template{name}: its text has no answer in any conversation",
                "correct it, or mark the answers in it by {% generation %} and {% endgeneration %}",
            )
        write_text(temporary / _TOKENIZER, tokenizer.to_json())
        report = DataReport(
            source=config.source if config.source != "hub" else str(config.hub_name),
            unit="conversation" if config.format == "chat" else "pair",
            documents=found.tally.documents,
            dropped=dict(found.tally.dropped),
            normalized=dict(found.tally.normalized),
            duplicates=len(found.hashes) - len(np.unique(found.hashes)),
            shared=int(np.isin(found.hashes[held_out], train).sum()),
            eos_token=config.eos_token,
            unended=sum(split.unended for split in written.values()),
            splits={name: split.info for name, split in written.items()},
        )
        files = [_TOKENIZER, *stored_files("train"), *stored_files("val")]
        entries = {**report.to_dict(), "layout": [*layout], "template": template}
        write_meta(temporary, folder.name, entries, list_files(temporary, files))


def _suitable(request: _Request, found: Found) -> str:
    """Return the template of rows for which none is set."""
    if found.strings:
        return RAW
    own = None if request.given is None else request.given.chat_template
    return own or PLAIN


def _trained(request: _Request, examples: Iterator[Example]) -> TextTokenizer:
    """Return a tokenizer that is trained on the contents of the messages."""
    texts = (
        f"{message['role']}: {message['content']}\n"
        for example in examples
        for message in example.conversation.messages
    )
    return train_bpe(texts, request.vocab_size, request.config.eos_token, 0, progress=False)


def _write(
    chat: ChatTemplate, examples: Iterable[Example], folder: Path, split: str, layout: Layout
) -> _Written:
    """Write a split and return its sizes."""
    digest, size, n, answers, unended = TextHash(), 0, 0, 0, 0
    eos_id = chat.tokens.tokenizer.eos_id

    def encoded() -> Iterator[tuple[list[int], list[bool]]]:
        nonlocal size, n, answers, unended
        rest = iter(examples)
        while batch := list(islice(rest, BATCH)):
            texts = [chat.answered(example.conversation, example.where) for example in batch]
            for text in texts:
                data = repr(text).encode("utf-8", "surrogatepass")
                digest.add(data, ends_document=True)
                size += len(text.text.encode("utf-8", "surrogatepass"))
                n += 1
            for ids, scored in encode_answers(chat.tokens, texts):
                answers += any(scored)
                unended += eos_id not in compress(ids, scored)
                yield ids, scored

    total = write_conversations(folder, split, layout, encoded(), eos_id)
    return _Written(SplitInfo(n, total, size, digest.value), answers, unended)


def encode_answers(
    tokens: SpecialTokens, texts: Iterable[AnsweredText]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the token ids of each conversation, and whether each token is part of an answer.

    Answers and the text between them are encoded separately, as a prompt is in generation, so that no token
    is part of both.
    """
    parts: list[list[tuple[str, bool]]] = []
    for text, answers in texts:
        cuts = [0, *(place for span in answers for place in span), len(text)]
        strings = [text[start:end] for start, end in pairwise(cuts)]
        parts.append([(string, bool(index % 2)) for index, string in enumerate(strings)])
    encoded = tokens.encode_batch([piece for pieces in parts for piece, _ in pieces])
    for pieces in parts:
        ids: list[int] = []
        scored: list[bool] = []
        for _, answer in pieces:
            found = next(encoded)
            ids += found
            scored += [answer] * len(found)
        yield ids, scored


def with_lengths(report: DataReport, train: AnswerRows, val: AnswerRows) -> DataReport:
    """Return the report with what the length of the rows excludes."""
    return replace(
        report,
        answers={"train": int(train.answers.sum()), "val": int(val.answers.sum())},
        cut=train.n_cut + val.n_cut,
        skipped=train.n_skipped + val.n_skipped,
    )
