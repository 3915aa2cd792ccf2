"""Text from a converted model: prefill the prompt in parallel, then one ``step`` per token.

Deployment code: needs torch, tokenizers, safetensors and omegaconf, nothing of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tnnlm.errors import UserError
from tnnlm.inference.sampling import SamplingParams, sample
from tnnlm.models.causal_lm import ModelState
from tnnlm.tokenizer import TextTokenizer

PREFILL_CHUNK = 512
"""prompt tokens per parallel pass: bounds memory, not results"""
MAX_NEW_TOKENS = 10_000_000
"""more is taken for a slip"""


@dataclass(frozen=True)
class GenerationState:
    """One or several sequences up to here: recurrent states and the logits of the next token. Immutable, so
    it can be forked."""

    model_state: ModelState
    logits: Tensor
    """(B, V)"""
    lengths: tuple[int, ...]
    """tokens of each sequence so far"""
    seconds: float
    """that the prefill took"""

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.lengths)

    def select(self, rows: Sequence[int]) -> GenerationState:
        """Some rows; ``[0] * n`` forks a single one."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.logits.device)
        lengths = tuple(self.lengths[row] for row in rows)
        return GenerationState(
            self.model_state.select(index), self.logits.index_select(0, index), lengths, self.seconds
        )


def join(states: Sequence[GenerationState]) -> GenerationState:
    """Sequences of several states of one model as one batch."""
    return GenerationState(
        ModelState.join([state.model_state for state in states]),
        torch.cat([state.logits for state in states]),
        tuple(length for state in states for length in state.lengths),
        max(state.seconds for state in states),
    )


@dataclass
class Completion:
    """Generated text; filled while its pieces are consumed."""

    state: GenerationState
    """after the last token that was fed back"""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    """in ``step`` and sampling, without what the consumer does between tokens"""

    @property
    def seconds_per_token(self) -> float:
        """0 before the first token."""
        return self.seconds / max(1, len(self.tokens))


def check_new_tokens(n: int) -> None:
    """Refuse a number of new tokens that is negative or absurd.

    Raises:
        UserError: naming it.
    """
    if not 0 <= n <= MAX_NEW_TOKENS:
        raise UserError(f"{n} new tokens: must be from 0 to {MAX_NEW_TOKENS:,}")


class DecoderModel(Protocol):
    """A model that decodes: a converted ``CausalLM``, or one whose step was compiled."""

    embedding: torch.nn.Embedding

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        ...

    def prefill(
        self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process tokens (B, L) in parallel."""
        ...

    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process one token per row (B,)."""
        ...


class TextGenerator:
    """A converted model and its tokenizer: prefills prompts and generates text.

    ``fingerprint`` names the model in saved states. :func:`tnnlm.inference.engine.open_engine` makes a fast
    one.
    """

    def __init__(self, model: DecoderModel, tokenizer: TextTokenizer, fingerprint: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.device = model.embedding.weight.device

    def __call__(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        *,
        seed: int | None = None,
    ) -> str:
        """Generate a continuation of ``prompt``, and return it without the prompt.

        Args:
            prompt: at least one character.
            max_new_tokens: the text ends here, or before at the end-of-document token.
            sampling: how tokens are drawn; None is ``SamplingParams()``.
            seed: of the random numbers; None draws another text at each call.

        Raises:
            UserError: if the prompt is empty or not valid Unicode, or ``max_new_tokens`` is out of bounds.
        """
        check_new_tokens(max_new_tokens)
        random = torch.Generator(self.device)
        random.seed() if seed is None else random.manual_seed(seed)
        _, pieces = self.stream(self.prefill([prompt]), max_new_tokens, sampling or SamplingParams(), random)
        return "".join(pieces)

    @torch.inference_mode()
    def prefill(self, texts: Sequence[str], state: GenerationState | None = None) -> GenerationState:
        """Process prompts in parallel, a row each, from an empty state or on top of ``state``, which has as
        many rows.

        Raises:
            UserError: if a prompt is empty or not valid Unicode.
        """
        rows = []
        for text in texts:
            try:
                rows.append(self.tokenizer.encode(text))
            except (TypeError, UnicodeEncodeError):
                raise UserError("the prompt is not valid UTF-8") from None
            if not rows[-1]:
                raise UserError("the prompt is empty", "give at least one character")
        return self.prefill_tokens(rows, state)

    @torch.inference_mode()
    def prefill_tokens(
        self, rows: Sequence[Sequence[int]], state: GenerationState | None = None
    ) -> GenerationState:
        """Prefill rows of token ids, at least one each, in chunks of bounded memory.

        Rows of different lengths are padded at their end; a pad leaves the state as it is.
        """
        started = time.perf_counter()
        model_state = state.model_state if state else self.model.init_state(len(rows))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        longest = int(lengths.max())
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)
        even = bool((lengths == longest).all())
        logits: Tensor | None = None
        for start in range(0, longest, PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            own = None if even else (lengths - start).clamp(0, chunk.shape[1])
            last, model_state = self.model.prefill(chunk, model_state, own, keep=1)
            # A row that ended in an earlier chunk keeps the logits from there.
            if logits is None or own is None:
                logits = last[:, 0]
            else:
                logits = torch.where((own > 0)[:, None], last[:, 0], logits)
        assert logits is not None
        before = state.lengths if state else (0,) * len(rows)
        after = tuple(old + len(row) for old, row in zip(before, rows, strict=True))
        return GenerationState(model_state, logits, after, time.perf_counter() - started)

    def stream(
        self,
        state: GenerationState,
        max_new_tokens: int,
        sampling: SamplingParams,
        generator: torch.Generator | None = None,
    ) -> tuple[Completion, Iterator[str]]:
        """Continue a single row: a record that fills up, and the pieces of text, correct UTF-8 each.

        Ends after ``max_new_tokens`` or at the end-of-document token, which is not shown.

        Raises:
            UserError: if ``max_new_tokens`` is negative or absurd.
        """
        check_new_tokens(max_new_tokens)
        record = Completion(state)
        tokens = self._tokens(record, max_new_tokens, sampling, generator)
        return record, self._pieces(record, tokens)

    @torch.inference_mode()
    def generate(
        self,
        state: GenerationState,
        max_new_tokens: int,
        sampling: SamplingParams,
        generator: torch.Generator | None = None,
    ) -> list[Completion]:
        """Continue all rows of ``state`` together, a token each per step.

        A row that reaches the end-of-document token leaves the batch; the others go on. Greedy rows are
        what :meth:`stream` gives for each alone; drawn ones share one random stream.

        Raises:
            UserError: if ``max_new_tokens`` is negative or absurd.
        """
        check_new_tokens(max_new_tokens)
        records = [Completion(state) for _ in state.lengths]
        rows, current = list(range(len(records))), state
        started = time.perf_counter()
        for _ in range(max_new_tokens):
            tokens = sample(current.logits[:, : self.tokenizer.size], sampling, generator)
            kept = [i for i, token in enumerate(tokens.tolist()) if token != self.tokenizer.eos_id]
            if len(kept) < len(rows):
                for i in {*range(len(rows))} - {*kept}:
                    records[rows[i]].state = current.select([i])
                tokens = tokens[torch.tensor(kept, dtype=torch.long, device=tokens.device)]
                current, rows = current.select(kept), [rows[i] for i in kept]
            if not rows:
                break
            logits, model_state = self.model.step(tokens, current.model_state)
            current = GenerationState(model_state, logits, tuple(n + 1 for n in current.lengths), 0.0)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                records[row].tokens.append(token)
                records[row].seconds = time.perf_counter() - started
        for i, row in enumerate(rows):
            records[row].state = current.select([i])
        for record in records:
            record.text = self.tokenizer.decode(record.tokens)
        return records

    def _pieces(self, record: Completion, tokens: Iterator[int]) -> Iterator[str]:
        for piece in self.tokenizer.stream(tokens):
            record.text += piece
            yield piece

    def _tokens(
        self, record: Completion, limit: int, sampling: SamplingParams, generator: torch.Generator | None
    ) -> Iterator[int]:
        for _ in range(limit):
            started = time.perf_counter()
            with torch.inference_mode():
                # Entries of the embedding that the tokenizer doesn't know can't be decoded.
                token = sample(record.state.logits[:, : self.tokenizer.size], sampling, generator)
                chosen = int(token)
                if chosen == self.tokenizer.eos_id:
                    return
                logits, model_state = self.model.step(token, record.state.model_state)
            record.state = GenerationState(model_state, logits, (record.state.n_tokens + 1,), 0.0)
            record.tokens.append(chosen)
            record.seconds += time.perf_counter() - started
            yield chosen
