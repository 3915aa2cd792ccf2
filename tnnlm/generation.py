"""Text from a converted model: prefill the prompt in parallel, then one ``step`` per token.

Deployment code: needs torch, tokenizers, safetensors and omegaconf, nothing of training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnnlm.errors import UserError
from tnnlm.model import CausalLM, ModelState
from tnnlm.tokenizer import TextTokenizer

PREFILL_CHUNK = 512
"""prompt tokens per parallel pass: bounds memory, not results"""
MAX_NEW_TOKENS = 10_000_000
"""more is taken for a slip"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; the cuts are applied in the order k, p."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise UserError(f"temperature {self.temperature}: must be from 0 (greedy) to 100")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1 (off)")


@dataclass(frozen=True)
class Context:
    """What has been read: the state and the logits of the next token. Immutable, so it can be forked."""

    state: ModelState
    logits: Tensor
    """(1, V)"""
    n_tokens: int
    seconds: float


@dataclass
class Continuation:
    """A text being written; filled while its pieces are consumed."""

    context: Context
    """after the last token that was read back"""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    """in ``step`` and sampling, without what the consumer does between tokens"""

    @property
    def seconds_per_token(self) -> float:
        """0 before the first token."""
        return self.seconds / max(1, len(self.tokens))


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw the next token of every row: logits (B, V) -> (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        # A token stays while the mass before it is below p, so the likeliest always does.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.gather(-1, index.argsort(-1)), -math.inf)
    probabilities = logits.softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


class TextGenerator:
    """A converted model and its tokenizer, ready to read prompts and write text."""

    def __init__(self, model: CausalLM, tokenizer: TextTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.embedding.weight.device

    @torch.inference_mode()
    def read(self, text: str, context: Context | None = None) -> Context:
        """Prefill ``text``, from an empty state or on top of ``context``.

        Raises:
            UserError: if the text is empty or not valid Unicode.
        """
        try:
            ids = self.tokenizer.encode(text)
        except (TypeError, UnicodeEncodeError):
            raise UserError("the prompt is not valid UTF-8") from None
        if not ids:
            raise UserError("the prompt is empty: give at least one character")
        return self.read_tokens(ids, context)

    @torch.inference_mode()
    def read_tokens(self, ids: Sequence[int], context: Context | None = None) -> Context:
        """Prefill token ids (at least one), in chunks of bounded memory."""
        started = time.perf_counter()
        state = context.state if context else self.model.init_state(1)
        tokens = torch.tensor([list(ids)], device=self.device)
        for chunk in tokens.split(PREFILL_CHUNK, dim=1):
            logits, state = self.model.prefill(chunk, state, keep=1)
        seconds = time.perf_counter() - started
        return Context(state, logits[:, -1], len(ids) + (context.n_tokens if context else 0), seconds)

    def write(
        self,
        context: Context,
        max_new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None = None,
    ) -> tuple[Continuation, Iterator[str]]:
        """Continue ``context``: a record that fills up, and the pieces of text, correct UTF-8 each.

        Ends after ``max_new_tokens`` or at the end-of-document token, which is not shown.

        Raises:
            UserError: if ``max_new_tokens`` is negative or absurd.
        """
        if not 0 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise UserError(f"{max_new_tokens} new tokens: must be from 0 to {MAX_NEW_TOKENS:,}")
        record = Continuation(context)
        tokens = self._tokens(record, max_new_tokens, sampling, generator)
        return record, self._pieces(record, tokens)

    def _pieces(self, record: Continuation, tokens: Iterator[int]) -> Iterator[str]:
        for piece in self.tokenizer.stream(tokens):
            record.text += piece
            yield piece

    def _tokens(
        self, record: Continuation, limit: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Iterator[int]:
        for _ in range(limit):
            started = time.perf_counter()
            with torch.inference_mode():
                # Entries of the embedding that the tokenizer doesn't know can't be written.
                token = sample(record.context.logits[:, : self.tokenizer.size], sampling, generator)
                chosen = int(token)
                if chosen == self.tokenizer.eos_id:
                    return
                logits, state = self.model.step(token, record.context.state)
            record.context = Context(state, logits, record.context.n_tokens + 1, 0.0)
            record.tokens.append(chosen)
            record.seconds += time.perf_counter() - started
            yield chosen
