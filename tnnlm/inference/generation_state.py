"""States of generation, of a batch of sequences in progress, and completions that are generated from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnnlm.models.causal_lm import ModelState


class TokenHistory:
    """Immutable sequence of token ids.

    A continuation appends to the list of the sequence before it, unless another continuation has done so
    already, in which case it copies the list.
    """

    __slots__ = ("_length", "_shared")

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._shared = list(tokens)
        self._length = len(self._shared)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self._shared[: self._length])

    def extended(self, tokens: Sequence[int]) -> TokenHistory:
        """Return the sequence with more tokens at its end."""
        longer = TokenHistory.__new__(TokenHistory)
        own = len(self._shared) == self._length
        longer._shared = self._shared if own else self._shared[: self._length]
        longer._shared.extend(tokens)
        longer._length = self._length + len(tokens)
        return longer


@dataclass(frozen=True)
class GenerationState:
    """Batch of sequences in progress: recurrent states and logits of the next token.

    It is immutable, so it can be forked.
    """

    model_state: ModelState
    logits: Tensor
    """Logits of the next token, (B, V)."""
    lengths: tuple[int, ...]
    """Number of tokens processed in each sequence."""
    seconds: float
    """Duration of the prefill in seconds."""
    history: tuple[TokenHistory, ...] | None = None
    """Tokens of each sequence; None if they are not known, as after loading a saved state."""

    @property
    def n_tokens(self) -> int:
        """Total number of tokens of all sequences."""
        return sum(self.lengths)

    def after(self, tokens: Sequence[int], model_state: ModelState, logits: Tensor) -> GenerationState:
        """Return the state of a single sequence after more tokens."""
        history = self.history and (self.history[0].extended(tokens),)
        return GenerationState(model_state, logits, (self.n_tokens + len(tokens),), 0.0, history)

    def select(self, rows: Sequence[int]) -> GenerationState:
        """Return the state of selected rows; ``[0] * n`` forks a single row n times."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.logits.device)
        lengths = tuple(self.lengths[row] for row in rows)
        history = self.history and tuple(self.history[row] for row in rows)
        logits = self.logits.index_select(0, index)
        return GenerationState(self.model_state.select(index), logits, lengths, self.seconds, history)


def join(states: Sequence[GenerationState]) -> GenerationState:
    """Concatenate several states of one model into one batch."""
    known = all(state.history is not None for state in states)
    return GenerationState(
        ModelState.join([state.model_state for state in states]),
        torch.cat([state.logits for state in states]),
        tuple(length for state in states for length in state.lengths),
        max(state.seconds for state in states),
        tuple(one for state in states for one in state.history or ()) if known else None,
    )


@dataclass
class Completion:
    """Generated text with its tokens and timing; filled while the stream is consumed."""

    state: GenerationState
    """State after the last token that the model has processed."""
    tokens: list[int] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    """Generated text in chunks; appending each of them to a string would take quadratic time."""
    seconds: float = 0.0
    """Seconds spent in ``step`` and sampling, without the time that the consumer takes between tokens."""
    passes: int = 0
    """Number of passes over the weights; less than the number of tokens with speculative decoding."""
    proposed: int = 0
    """Number of tokens that speculative decoding proposed."""
    accepted: int = 0
    """Number of proposed tokens that were right."""

    @property
    def text(self) -> str:
        """Generated text so far."""
        return "".join(self.chunks)

    @property
    def seconds_per_token(self) -> float:
        """Mean seconds per generated token; 0 before the first token."""
        return self.seconds / max(1, len(self.tokens))

    @property
    def tokens_per_pass(self) -> float:
        """Mean number of tokens per pass over the weights; 0 before the first token."""
        return len(self.tokens) / max(1, self.passes)

    @property
    def accepted_share(self) -> float:
        """Share of the proposed tokens that were right; 0 if none was proposed."""
        return self.accepted / max(1, self.proposed)
