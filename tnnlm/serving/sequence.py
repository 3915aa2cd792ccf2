"""A sequence of a request from its prompt to its last token, and what each step adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tnnlm.inference.generator import GenerationState
from tnnlm.serving.logprobs import TokenScore
from tnnlm.serving.sampler import SequenceSampler
from tnnlm.tokenizer import TextStream, TextTokenizer

Finish: TypeAlias = Literal["stop", "length", "error"]
TIMEOUT = "timeout"
"""the error of a sequence whose time ran out before its first token"""


@dataclass
class SequenceOutput:
    """What one step added to a sequence."""

    sequence: GeneratedSequence
    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    tokens: int = 0
    """new ones, the end token not counted"""
    position: int = 0
    """tokens of context after them"""
    step_ms: list[float] = field(default_factory=list)
    """of the step behind each"""
    finish: Finish | None = None
    error: str = ""

    def merge(self, later: SequenceOutput) -> None:
        """Add a later output of the same sequence."""
        self.text += later.text
        self.scores += later.scores
        self.tokens += later.tokens
        self.position = later.position
        self.step_ms += later.step_ms
        self.finish, self.error = later.finish, later.error


class StoppedText:
    """Text of tokens as they come, up to the first stop string; what might begin one is held back."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        return "" if self.stopped else self._show(self._stream.push(token), False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return "" if self.stopped else self._show(self._stream.finish(), True)

    def _show(self, piece: str, last: bool) -> str:
        self._held += piece
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class GeneratedSequence:
    """One sequence: how it is sampled, and how far it is."""

    sampler: SequenceSampler
    text: StoppedText
    max_tokens: int
    deadline: float
    """on the monotonic clock"""
    owner: Any = None
    """whom its outputs are for"""
    logprobs: int | None = None
    drawn: list[int] = field(default_factory=list)
    """the end token too"""
    position: int = 0
    """tokens processed"""
    cached: int = 0
    """of the prompt's tokens, found in the cache"""
    cancelled: bool = False


@dataclass(eq=False)
class Prompt:
    """A prompt with the sequences that begin with it: prefilled once, then forked."""

    tokens: list[int]
    sequences: list[GeneratedSequence]
    score_prompt: int | None = None
    """how many alternatives to score the prompt's tokens with; None leaves it"""
    state: GenerationState | None = None
    position: int = 0
    """tokens processed"""
    cached: int = 0
    """of these, found in the cache"""

    @property
    def complete(self) -> bool:
        """Whether it was processed to its end."""
        return self.position == len(self.tokens)
