"""Conversations in the columns that TRL names: ``messages``, or ``prompt`` and ``completion``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tnnlm.chat.templates import ASSISTANT, Conversation, Message, check_message
from tnnlm.config.schema import DataConfig
from tnnlm.data.conversations.tables import Row, read_rows
from tnnlm.data.text import BLANK, NULL, Tally, listed, normalized
from tnnlm.errors import DataError

COLUMNS = {"chat": ("messages",), "prompt_completion": ("prompt", "completion")}
"""Columns by ``data.format``."""
NO_ANSWER = "without an answer"
"""Reason to drop a conversation: no message of it is an answer."""


class Example(NamedTuple):
    """Conversation of a data set."""

    where: str
    """Place that error messages start with."""
    conversation: Conversation
    strings: bool
    """Whether prompt and completion are strings, and no messages."""


def read_examples(config: DataConfig, tally: Tally, held_out: bool = False) -> Iterator[Example]:
    """Yield the conversations of the data set that have an answer, and count them in ``tally``.

    Args:
        config: Data settings.
        tally: Counts of what is read, dropped and changed.
        held_out: Read ``data.validation``, or ``data.hub_val_split``, instead of the other rows.

    Raises:
        DataError: If a column is missing, a message is unusable, or strings and messages are mixed.
    """
    columns = COLUMNS[config.format]
    first: bool | None = None
    for row in read_rows(config, columns, held_out):
        cells = [_cell(row, column, config.format) for column in columns]
        if None in cells:
            tally.dropped[NULL] += 1
            continue
        example = _messages(row.where, cells[0]) if len(cells) == 1 else _pair(row.where, *cells)
        if first is not None and example.strings != first:
            raise DataError(
                f"{row.where}: mixes strings and messages with other rows", "write all rows in one way"
            )
        first = example.strings
        reason = _unusable(example.conversation)
        if reason:
            tally.dropped[reason] += 1
            continue
        tally.documents += 1
        yield _normalized(example, tally) if config.normalize_text else example
        if tally.documents == config.max_documents:
            return


def _cell(row: Row, column: str, kind: str) -> Any:
    if column not in row.cells:
        raise DataError(
            f"{row.where}: has no column {column!r}, only {listed(row.cells)}",
            f"data.format={kind} reads {' and '.join(COLUMNS[kind])}; set the format of this data",
        )
    return row.cells[column]


def _messages(where: str, cell: Any) -> Example:
    return Example(where, Conversation(_message_list(where, "messages", cell)), strings=False)


def _pair(where: str, prompt: Any, completion: Any) -> Example:
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = (("user", prompt), (ASSISTANT, completion))
        messages = [{"role": role, "content": text} for role, text in texts]
        return Example(where, Conversation(messages, given=1), strings=True)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(
            f"{where}: mixes strings and messages",
            "write prompt and completion both as strings or as messages",
        )
    before = _message_list(where, "prompt", prompt)
    after = _message_list(where, "completion", completion)
    return Example(where, Conversation([*before, *after], given=len(before)), strings=False)


def _message_list(where: str, column: str, cell: Any) -> list[Message]:
    if not isinstance(cell, list):
        raise DataError(
            f"{where}: {column} is no list of messages but {type(cell).__name__}",
            'write [{"role": "user", "content": "..."}, ...]',
        )
    if not cell:
        raise DataError(f"{where}: {column} is an empty list", "remove the row, or add messages")
    return [check_message(message, f"{where}: {column}[{index}]") for index, message in enumerate(cell)]


def _unusable(conversation: Conversation) -> str:
    """Return why a conversation can't be learned from; empty if it can."""
    answers = [m for m in conversation.messages[conversation.given :] if m["role"] == ASSISTANT]
    if not answers:
        return NO_ANSWER
    return "" if any(message["content"].strip() for message in answers) else BLANK


def _normalized(example: Example, tally: Tally) -> Example:
    messages = []
    for message in example.conversation.messages:
        text = message["content"]
        tally.count_changes(text)
        messages.append({**message, "content": normalized(text)})
    return example._replace(conversation=example.conversation._replace(messages=messages))
