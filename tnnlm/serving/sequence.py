"""Sequences of a request, their prompts, and the outputs that each step adds to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from tnnlm.detokenizer import TextStream
from tnnlm.inference.generator import GenerationState
from tnnlm.serving.logprobs import TokenScore
from tnnlm.serving.sampler import SequenceSampler

Finish: TypeAlias = Literal["stop", "length", "error"]
TIMEOUT = "timeout"
"""Error of a sequence that timed out before its first token."""
SHUTDOWN = "the server is shutting down"
"""Error of a sequence that runs when the server stops."""


@dataclass
class SequenceOutput:
    """Output that one step adds to a sequence."""

    sequence: GeneratedSequence
    text: str = ""
    """Text to append to the completion."""
    scores: list[TokenScore] = field(default_factory=list)
    """Log-probabilities, if requested, of the new tokens and the end token, or of a chunk of the prompt."""
    tokens: int = 0
    """Number of new tokens, without the end-of-document token."""
    position: int = 0
    """Context length in tokens after this output."""
    step_ms: list[float] = field(default_factory=list)
    """Duration in milliseconds of the step that produced each token."""
    finish: Finish | None = None
    """Finish reason; None while the sequence is running."""
    error: str = ""
    """Error message, if ``finish`` is error."""

    @classmethod
    def joined(cls, outputs: Sequence[SequenceOutput]) -> SequenceOutput:
        """Return consecutive outputs of a sequence as one, in time linear in their length."""
        last = outputs[-1]
        return cls(
            last.sequence,
            "".join(output.text for output in outputs),
            [score for output in outputs for score in output.scores],
            sum(output.tokens for output in outputs),
            last.position,
            [ms for output in outputs for ms in output.step_ms],
            last.finish,
            last.error,
        )


class StoppedText:
    """Incremental detokenizer that ends at the first stop string.

    Text that may be the beginning of a stop string is buffered.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str], lead: str = "") -> None:
        """Begin a text without ``lead``, if it begins with that."""
        self._stream = stream
        self._stops = tuple(stops)
        self._lead = lead
        self._held = ""
        self.shown = 0
        """Number of characters that can be shown."""
        self.stopped = False

    @property
    def held(self) -> bool:
        """Whether text is buffered."""
        return bool(self._held)

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown."""
        return "" if self.stopped else self._show(self._stream.push(token), False)

    def finish(self) -> str:
        """Return the buffered text after the last token."""
        return "" if self.stopped else self._show(self._stream.finish(), True)

    def _show(self, piece: str, last: bool) -> str:
        self._held += piece
        if self._lead:
            if not last and self._lead.startswith(self._held) and self._held != self._lead:
                return ""
            self._held, self._lead = self._held.removeprefix(self._lead), ""
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)], ""
            self.shown += len(shown)
            return shown
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self.shown += cut
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0


class Beginning(NamedTuple):
    """Prompt of a sequence, without the other sequences that continue it."""

    tokens: list[int]
    """Tokens of its prompt."""
    partition: bytes
    """Part of the prefix cache that its prompt belongs to."""
    text: str | None
    """Text of a conversation; None for another prompt."""
    lead: str
    """White space that a template writes before an answer to it."""


class Mark(NamedTuple):
    """State of a sequence before a token that may begin a stop string."""

    shown: int
    """Number of characters of the text before the token."""
    tokens: int
    """Number of generated tokens before it."""
    state: GenerationState
    """State after the prompt and these tokens."""


@dataclass(eq=False)
class GeneratedSequence:
    """Sequence in generation, with its sampler, limits and progress."""

    sampler: SequenceSampler
    """Sampler of the next token."""
    text: StoppedText
    """Detokenizer with the stop strings."""
    max_tokens: int
    """Maximum number of tokens to generate."""
    deadline: float
    """Time at which the sequence times out, in seconds of the monotonic clock."""
    owner: Callable[[], Any] | None = None
    """Weak reference to the response that receives the outputs: both are freed as soon as a request ends."""
    logprobs: int | None = None
    """Number of alternatives to score for each token; None scores no tokens."""
    drawn: list[int] = field(default_factory=list)
    """Sampled tokens, including the end-of-document token."""
    position: int = 0
    """Number of tokens processed, prompt included."""
    cached: int = 0
    """Number of prompt tokens found in the prefix cache."""
    mark: Mark | None = None
    """Where the answer of a chat may end by a stop string; None if it can't yet."""
    n_marks: int = 0
    """Number of marks so far."""
    complete: bool = False
    """Whether the sequence has ended with a finish reason."""
    cancelled: bool = False
    """Whether the sequence is to be removed in the next iteration."""
    beginning: Beginning | None = None
    """Prompt that the sequence continues; None before its first token."""
    arrived: float = field(default_factory=time.monotonic)
    """Time at which the request arrived, in seconds of the monotonic clock."""

    def advance(self, token: int, end: int | None, score: TokenScore | None) -> SequenceOutput:
        """Add a sampled token to the sequence and return its output; ``end`` is the end-of-document token."""
        self.drawn.append(token)
        output = SequenceOutput(self, position=self.position)
        if score is not None:
            output.scores = [score]
        if token == end:
            output.finish = "stop"
        else:
            output.tokens = 1
            output.text = self.text.push(token)
            if self.text.stopped:
                output.finish = "stop"
            elif len(self.drawn) >= self.max_tokens:
                output.finish = "length"
        if output.finish:
            output.text += self.text.finish()
            if self.text.stopped:  # by a stop string in the text that was buffered
                output.finish = "stop"
            self.complete = True
        return output


@dataclass(eq=False)
class Prompt:
    """Prompt with the sequences to generate from it; it is prefilled once, then its state is forked."""

    tokens: list[int]
    """Token ids of the prompt."""
    sequences: list[GeneratedSequence]
    """Sequences to generate."""
    score_prompt: int | None = None
    """Number of alternatives to score for each token of the prompt; None doesn't score the prompt."""
    echo: str = ""
    """Text of the prompt that is returned before the text of each sequence."""
    partition: bytes = b""
    """Part of the prefix cache that the prompt shares with others; up to 64 bytes."""
    text: str | None = None
    """Text of a conversation as its template made it; None for another prompt."""
    lead: str = ""
    """White space that the template writes before an answer."""
    state: GenerationState | None = None
    """State after the processed tokens."""
    position: int = 0
    """Number of prompt tokens processed, or found in the prefix cache."""
    cached: int = 0
    """Number of prompt tokens found in the prefix cache."""

    @property
    def complete(self) -> bool:
        """Whether all tokens were processed."""
        return self.position == len(self.tokens)
