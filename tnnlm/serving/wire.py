"""Formats of the choices in answers and events: those of completions, and those of chats."""

from __future__ import annotations

from typing import Any, NamedTuple


class WireFormat(NamedTuple):
    """Format of an endpoint; its fields are JSON around the text of a choice."""

    prefix: str
    """Beginning of the identifiers of responses."""
    answer: str
    """Name of the object that is a complete answer."""
    event: str
    """Name of the object that is an event of a stream."""
    before: str
    """JSON before the text in an event, after the index of the choice."""
    after: str
    """JSON after the text in an event, before the log-probabilities."""
    whole_before: str
    """JSON before the text in a complete answer, after the index of the choice."""
    whole_after: str
    """JSON after the text in a complete answer, before the log-probabilities."""
    role: bool
    """Whether the first event of a choice has the role of its author, and no text."""
    score_scale: int
    """Size of log-probabilities relative to those of completions."""

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Return a choice of an event."""
        content: dict[str, Any] = {"text": text}
        if self.role:  # the last event of a chat has no content
            content = {"delta": {"content": text} if text or not finish else {}}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the choice of the first event, which has the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def encoded(self, index: int, text: str, logprobs: str, finish: str) -> str:
        """Return the JSON of a choice of a complete answer, given the JSON of its parts."""
        inside = f"{self.whole_before}{text}{self.whole_after}"
        return f'{{"index":{index},{inside},"logprobs":{logprobs},"finish_reason":{finish}}}'


COMPLETION = WireFormat(
    "cmpl", "text_completion", "text_completion", '"text":', "", '"text":', "", role=False, score_scale=1
)
"""Format of ``/v1/completions``."""
CHAT = WireFormat(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    '"delta":{"content":',
    "}",
    '"message":{"role":"assistant","content":',
    ',"refusal":null}',
    role=True,
    score_scale=2,
)
"""Format of ``/v1/chat/completions``."""
