"""Data sets of each training task: causal, masked and classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

from torch.utils.data import Dataset, Subset

from tnnlm.config.schema import Config
from tnnlm.data.conversations.prepare import ConversationCorpus, prepare_conversations, with_lengths
from tnnlm.data.conversations.rows import AnswerRows
from tnnlm.data.masking import MaskedRows, Masking
from tnnlm.data.mixture import MixedCorpus, MixedRows, open_text_corpus
from tnnlm.data.order import Share
from tnnlm.data.packing import PackedCorpus, PackedRows
from tnnlm.data.report import DataReport
from tnnlm.data.scored_bytes import bytes_per_scored_token
from tnnlm.data.sequences.prepare import prepare_sequences, task_name
from tnnlm.data.sequences.symbols import symbol_tokenizer
from tnnlm.errors import DataError
from tnnlm.models.batches import LabelledBatch
from tnnlm.tokenizer import TextTokenizer


@overload
def split_rows(corpus: PackedCorpus, config: Config) -> tuple[PackedRows, PackedRows]: ...
@overload
def split_rows(corpus: MixedCorpus, config: Config) -> tuple[MixedRows, MixedRows]: ...
def split_rows(
    corpus: PackedCorpus | MixedCorpus, config: Config
) -> tuple[PackedRows | MixedRows, PackedRows | MixedRows]:
    """Return the packed rows of the training and validation splits.

    Raises:
        DataError: If the training split has less than one batch, or the validation split less than one row.
    """
    _check_val_tokens(config)
    data, length = config.data, config.model.max_length
    train_rows = corpus.rows("train", length)
    val_rows = corpus.rows("val", length, data.max_val_tokens)
    if len(train_rows) < data.batch_size:
        # The target of the last token of a batch is one more token.
        raise DataError(
            f"data: too little text, {corpus.train.tokens} training tokens, where one batch of "
            f"{data.batch_size} x {length} needs {data.batch_size * length + 1}",
            "add text, or lower data.batch_size or model.max_length",
        )
    if not len(val_rows):
        raise DataError(
            f"data: too little text, {corpus.val.tokens} validation tokens, where one row of {length} needs "
            f"{length + 1}",
            "add text, raise data.val_fraction, or lower model.max_length",
        )
    return train_rows, val_rows


def _check_val_tokens(config: Config) -> None:
    limit, length = config.data.max_val_tokens, config.model.max_length
    if limit is not None and limit < length:
        raise DataError(
            f"data.max_val_tokens={limit}: is less than one row of model.max_length={length}",
            f"set it to {length} or more, or to null",
        )


class TaskData(NamedTuple):
    """Data sets and tokenizer of a training run."""

    train: Any
    """Map-style data set of the training rows, indexed by row, or by (row, sample) if ``resampled``."""
    val: Any
    """Map-style data set of the validation rows."""
    tokenizer: TextTokenizer
    report: DataReport
    """Report of the data set."""
    bytes_per_token: float | None
    """UTF-8 bytes per token of the text that is validated on; 1 for tasks without text. None if the text
    can't be recovered from the tokens, see :attr:`~tnnlm.data.report.DataReport.lossy`."""
    tokens_per_word: float | None = None
    """Tokens per word of the text that is validated on, for perplexity per word; None if it is unknown."""
    mixture: Sequence[Share] = ()
    """Training rows and weight of each source of a mixture, in the order of the rows of ``train``."""
    resampled: bool = False
    """Whether training rows are randomised per sample (masking) and indexed by (row, sample)."""


def load_task_data(config: Config) -> TaskData:
    """Prepare the data of ``config.task``, or load it from the cache.

    Raises:
        DataError: If the data is unusable, or less than one batch.
    """
    _check_val_tokens(config)
    if config.data.format != "text":
        return _open_conversations(config)
    return OPENERS[config.task](config)


def _open_text(config: Config) -> TaskData:
    """Open the data of a causal model: rows (L + 1,) that hold inputs and targets in one tensor."""
    corpus = open_text_corpus(config.data, config.model.vocab_size, config.seed)
    if isinstance(corpus, MixedCorpus):
        return _open_mixture(corpus, config)
    train, val = split_rows(corpus, config)
    n_bytes = None if corpus.report.lossy else bytes_per_scored_token(corpus, val, "val")
    return TaskData(train, val, corpus.tokenizer, corpus.report, n_bytes, corpus.val.tokens_per_word)


def _open_mixture(corpus: MixedCorpus, config: Config) -> TaskData:
    train, val = split_rows(corpus, config)
    pairs = [pair for pair in zip(corpus.parts, val.parts, strict=True) if len(pair[1])]
    return TaskData(
        train,
        val,
        corpus.tokenizer,
        corpus.report,
        None if corpus.report.lossy else _mean_bytes(pairs),
        corpus.val.tokens_per_word,
        mixture=corpus.shares(train),
    )


def _mean_bytes(pairs: Sequence[tuple[PackedCorpus, PackedRows]]) -> float:
    """Return the UTF-8 bytes of text per token of the validation rows of several corpora."""
    sizes = [len(rows) for _, rows in pairs]
    means = [bytes_per_scored_token(corpus, rows, "val") for corpus, rows in pairs]
    return sum(size * mean for size, mean in zip(sizes, means, strict=True)) / sum(sizes)


def open_corpus(config: Config) -> PackedCorpus | MixedCorpus | ConversationCorpus:
    """Prepare the tokens of a causal model, text or conversations, or load them from the cache.

    Raises:
        DataError: If the data is unusable.
    """
    if config.data.format != "text":
        return prepare_conversations(config)
    return open_text_corpus(config.data, config.model.vocab_size, config.seed)


def split_answers(corpus: ConversationCorpus, config: Config) -> tuple[AnswerRows, AnswerRows, DataReport]:
    """Return the rows of the training and validation splits of conversations, and their report.

    Raises:
        DataError: If no conversation has an answer in its first ``model.max_length`` tokens, or the training
            split has less than one batch.
    """
    _check_val_tokens(config)
    data, length = config.data, config.model.max_length
    train, val = corpus.answers("train", length, data.packing), corpus.answers("val", length)
    report = with_lengths(corpus.report, train, val)
    val = val.by_length(data.max_val_tokens)
    for name, rows in (("train", train), ("validate", val)):
        if not len(rows):
            raise DataError(
                f"data: no {report.unit} to {name} on has an answer within model.max_length={length} tokens",
                "raise model.max_length, or give shorter ones",
            )
    if len(train) < data.batch_size:
        raise DataError(
            f"data: too few rows, {len(train)} to train on, where one batch needs {data.batch_size}",
            f"add {report.unit}s, or lower data.batch_size",
        )
    return train, val, report


def _open_conversations(config: Config) -> TaskData:
    """Open conversations: rows are token ids of which answers are scored; batches are ``AnswerBatch``."""
    corpus = prepare_conversations(config)
    train, val, report = split_answers(corpus, config)
    return TaskData(train, val, corpus.tokenizer, report, None)


def _open_masked(config: Config) -> TaskData:
    """Open the data of a masked language model: rows are ``MaskedBatch``."""
    text, data = _open_text(config), config.data
    assert data.mask_token is not None  # checked by the configuration loader
    tokenizer = text.tokenizer
    masking = Masking(data.mask_fraction, tokenizer.id_of(data.mask_token), tokenizer.size, config.seed)
    train, val = MaskedRows(text.train, masking), MaskedRows(text.val, masking)
    return text._replace(train=train, val=val, resampled=True)


def _open_sequences(config: Config) -> TaskData:
    """Open the data of a classifier: rows are ``LabelledBatch``."""
    tokenizer = symbol_tokenizer(task_name(config), config.data.eos_token)
    corpus, length = prepare_sequences(config), config.model.max_length
    train = corpus.split("train", length)
    val: Dataset[LabelledBatch] = corpus.split("val", length)
    rows, size = corpus.rows["val"], config.data.batch_size
    if len(train) < size:
        raise DataError(
            f"data: too few sequences, {len(train)} to train on, where one batch needs {size}",
            "add sequences, or lower data.batch_size",
        )
    if not rows:
        raise DataError("data: too few sequences, 0 to validate on", "add sequences")
    if config.data.max_val_tokens is not None:
        val = Subset(val, range(min(rows, config.data.max_val_tokens // length)))
    return TaskData(train, val, tokenizer, corpus.report, 1.0)


OPENERS: dict[str, Callable[[Config], TaskData]] = {
    "causal": _open_text,
    "masked": _open_masked,
    "classify": _open_sequences,
}
"""Function that prepares and opens the data, by ``config.task``."""
