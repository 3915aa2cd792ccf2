"""Text generation with a converted model: parallel prefill of the prompt, then one ``step`` per token.

This is deployment code: it needs torch, tokenizers, safetensors and omegaconf, but no training dependencies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tnnlm.errors import UserError
from tnnlm.inference.adjustments import Adjustments, changes_of, sample_rows
from tnnlm.inference.decoder import DecoderModel
from tnnlm.inference.generation_state import Completion, GenerationState, TokenHistory, join
from tnnlm.inference.grammar import Grammar
from tnnlm.inference.prompts import encode_prompt
from tnnlm.inference.sampling import SamplingParams, sample
from tnnlm.inference.speculation import Sampler, Speculation, speculate
from tnnlm.inference.speculation_batch import speculate_batch
from tnnlm.models.vocabulary import mask_missing
from tnnlm.tokenizer import TextTokenizer

__all__ = ["MAX_NEW_TOKENS", "Completion", "GenerationState", "TextGenerator", "check_new_tokens", "join"]

PREFILL_CHUNK = 512
"""Prompt tokens per parallel pass; it bounds memory and doesn't change results."""
MAX_NEW_TOKENS = 10_000_000
"""Largest accepted number of new tokens."""


def check_new_tokens(n: int) -> None:
    """Check that a number of new tokens is in range.

    Raises:
        UserError: If it is negative or above ``MAX_NEW_TOKENS``.
    """
    if not 0 <= n <= MAX_NEW_TOKENS:
        raise UserError(f"max_new_tokens {n}: must be from 0 to {MAX_NEW_TOKENS:,}")


class TextGenerator:
    """Text generator with a converted model and its tokenizer.

    :func:`tnnlm.inference.engine.open_engine` returns one with the fastest engine. ``fingerprint`` identifies
    the model in saved states. ``speculation`` makes :meth:`stream` check several proposed tokens per pass.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: TextTokenizer,
        fingerprint: str = "",
        speculation: Speculation | None = None,
    ) -> None:
        self.model = model
        self.speculation = speculation
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.device = model.embedding.weight.device
        missing = tokenizer.missing_ids(tokenizer.size)
        self._gaps = torch.tensor(missing, dtype=torch.long, device=self.device)

    def token_logits(self, logits: Tensor) -> Tensor:
        """Return the logits (..., tokenizer.size) of ids of the tokenizer from those of the model, (..., V).

        Entries beyond the vocabulary are cut off and those in its gaps become minus infinity, because neither
        can be decoded.
        """
        return mask_missing(logits[..., : self.tokenizer.size], self._gaps)

    def __call__(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        sampling: SamplingParams | None = None,
        *,
        seed: int | None = None,
        grammar: Grammar | None = None,
    ) -> str:
        """Generate a completion of ``prompt`` and return it without the prompt.

        Args:
            prompt: Prompt of at least one character.
            max_new_tokens: Maximum number of tokens to generate; the end-of-document token ends generation
                earlier.
            sampling: Sampling parameters (default: ``SamplingParams()``).
            seed: Seed of the random number generator; None samples differently at each call.
            grammar: Grammar of the completion, from :class:`tnnlm.inference.grammar.GrammarCompiler`.

        Raises:
            UserError: If the prompt is empty or not valid Unicode, or a number is out of range.
        """
        check_new_tokens(max_new_tokens)
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise UserError(f"seed {seed}: must be from -2^63 to 2^64 - 1")
        random = torch.Generator(self.device)
        random.seed() if seed is None else random.manual_seed(seed)
        state, sampling = self.prefill([prompt]), sampling or SamplingParams()
        _, chunks = self.stream(state, max_new_tokens, sampling, random, grammar)
        return "".join(chunks)

    @torch.inference_mode()
    def prefill(self, texts: Sequence[str], state: GenerationState | None = None) -> GenerationState:
        """Prefill a batch of prompts of at least one character each.

        ``state`` is continued and has one row per prompt; by default it is the empty state.

        Raises:
            UserError: If a prompt is empty or not valid Unicode, or has no tokens.
        """
        return self.prefill_tokens([encode_prompt(self.tokenizer, text) for text in texts], state)

    @torch.inference_mode()
    def prefill_tokens(
        self, rows: Sequence[Sequence[int]], state: GenerationState | None = None
    ) -> GenerationState:
        """Prefill rows of at least one token id each, in chunks that bound memory.

        Rows of different lengths are padded on the right; padding doesn't change the state.
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
            valid = None if even else (lengths - start).clamp(0, chunk.shape[1])
            # The head is run only for the chunks in which a row ends.
            ends = any(start < len(row) <= start + PREFILL_CHUNK for row in rows)
            last, model_state = self.model.prefill(chunk, model_state, valid, keep=int(ends))
            if not ends:
                continue
            # A row that ended in an earlier chunk keeps the logits of that chunk.
            if logits is None or valid is None:
                logits = last[:, 0]
            else:
                logits = torch.where((valid > 0)[:, None], last[:, 0], logits)
        assert logits is not None
        before = state.lengths if state else (0,) * len(rows)
        after = tuple(old + len(row) for old, row in zip(before, rows, strict=True))
        known = state.history if state else tuple(TokenHistory() for _ in rows)
        history = known and tuple(old.extended(row) for old, row in zip(known, rows, strict=True))
        return GenerationState(model_state, logits, after, time.perf_counter() - started, history)

    def stream(
        self,
        state: GenerationState,
        max_new_tokens: int,
        sampling: SamplingParams,
        generator: torch.Generator | None = None,
        grammar: Grammar | None = None,
    ) -> tuple[Completion, Iterator[str]]:
        """Generate a completion of a single row and stream its text.

        Generation ends after ``max_new_tokens`` tokens or at the end-of-document token, which is not part of
        the text. Penalties and a grammar depend on each token before, so that no tokens are proposed with
        them.

        Returns:
            A record that is filled while the stream is consumed, and an iterator over chunks of text, each of
            which is valid UTF-8.

        Raises:
            UserError: If ``max_new_tokens`` is out of range.
        """
        check_new_tokens(max_new_tokens)
        record = Completion(state)
        changes = changes_of(state, sampling, self.tokenizer.size, grammar)
        if self.speculation is None or changes:
            tokens = self._tokens(record, max_new_tokens, sampling, generator, changes)
        else:
            tokens = self._speculated_tokens(record, max_new_tokens, sampling, generator)
        return record, self._text_chunks(record, tokens)

    @torch.inference_mode()
    def generate(
        self,
        state: GenerationState,
        max_new_tokens: int,
        sampling: SamplingParams,
        generator: torch.Generator | None = None,
        grammar: Grammar | None = None,
    ) -> list[Completion]:
        """Generate completions of all rows of ``state`` in one batch, one token per row and step.

        A row that reaches the end-of-document token is removed from the batch. With greedy decoding a row
        gives the same tokens as :meth:`stream`; sampled rows share one random number generator.

        Raises:
            UserError: If ``max_new_tokens`` is out of range.
        """
        check_new_tokens(max_new_tokens)
        changes = changes_of(state, sampling, self.tokenizer.size, grammar)
        if self.speculation is not None and self.speculation.for_batches and not changes:
            return self._speculated_batch(state, max_new_tokens, sampling, generator)
        records = [Completion(state) for _ in state.lengths]
        rows, current = list(range(len(records))), state
        owned = False  # the caller keeps its state, but those that follow are used once
        started = time.perf_counter()
        for _ in range(max_new_tokens):
            tokens = self._sampled(current.logits, sampling, generator, changes)
            chosen = tokens.tolist()
            kept = [i for i, token in enumerate(chosen) if token != self.tokenizer.eos_id]
            if len(kept) < len(rows):
                for i in {*range(len(rows))} - {*kept}:
                    records[rows[i]].state = current.select([i])
                tokens = tokens[torch.tensor(kept, dtype=torch.long, device=tokens.device)]
                current, rows = current.select(kept), [rows[i] for i in kept]
                chosen, changes = [chosen[i] for i in kept], [changes[i] for i in kept if changes]
            if not rows:
                break
            step = self.model.step_in_place if owned else self.model.step
            (logits, model_state), owned = step(tokens, current.model_state), True
            current = GenerationState(model_state, logits, tuple(n + 1 for n in current.lengths), 0.0)
            for row, token in zip(rows, chosen, strict=True):
                records[row].tokens.append(token)
                records[row].passes += 1
                records[row].seconds = time.perf_counter() - started
        for i, row in enumerate(rows):
            records[row].state = current.select([i])
        for record in records:
            record.chunks = [self.tokenizer.decode(record.tokens, started=True)]
        return records

    def _sampled(
        self,
        logits: Tensor,
        sampling: SamplingParams,
        generator: torch.Generator | None,
        changes: Sequence[Adjustments],
    ) -> Tensor:
        """Sample the next tokens (B,) from the logits of the model, (B, V)."""
        logits = self.token_logits(logits)
        if changes:
            return sample_rows(logits, sampling, generator, changes)
        return sample(logits, sampling, generator)

    def _speculated_batch(
        self, state: GenerationState, limit: int, sampling: SamplingParams, generator: torch.Generator | None
    ) -> list[Completion]:
        assert self.speculation is not None
        started = time.perf_counter()
        history = state.history or ((),) * len(state.lengths)
        rows = speculate_batch(
            self.model,
            state.model_state,
            state.logits,
            limit,
            self.tokenizer.eos_id,
            lambda logits: sample(self.token_logits(logits), sampling, generator).tolist(),
            [self.speculation.start(tokens, sampling, generator) for tokens in history],
            self.speculation.costs(len(history), sampling),
        )
        seconds, records = time.perf_counter() - started, []
        for index, row in enumerate(rows):
            assert row.state is not None
            assert row.logits is not None
            after = state.select([index]).after(row.tokens, row.state, row.logits)
            text = [self.tokenizer.decode(row.tokens, started=True)]
            records.append(
                Completion(after, row.tokens, text, seconds, row.passes, row.proposed, row.accepted)
            )
        return records

    def _text_chunks(self, record: Completion, tokens: Iterator[int]) -> Iterator[str]:
        for chunk in self.tokenizer.stream(tokens, started=True):
            record.chunks.append(chunk)
            yield chunk

    def _tokens(
        self,
        record: Completion,
        limit: int,
        sampling: SamplingParams,
        generator: torch.Generator | None,
        changes: Sequence[Adjustments],
    ) -> Iterator[int]:
        for _ in range(limit):
            started = time.perf_counter()
            with torch.inference_mode():
                token = self._sampled(record.state.logits, sampling, generator, changes)
                chosen = int(token)
                if chosen == self.tokenizer.eos_id:
                    return
                logits, model_state = self.model.step(token, record.state.model_state)
            record.state = record.state.after([chosen], model_state, logits)
            record.tokens.append(chosen)
            record.passes += 1
            record.seconds += time.perf_counter() - started
            yield chosen

    def _speculated_tokens(
        self, record: Completion, limit: int, sampling: SamplingParams, generator: torch.Generator | None
    ) -> Iterator[int]:
        assert self.speculation is not None
        started, state = time.perf_counter(), record.state
        proposer = self.speculation.start((state.history or ((),))[0], sampling, generator)
        costs = self.speculation.costs(1, sampling)
        chooser, eos_id = Sampler(self.token_logits, sampling, generator), self.tokenizer.eos_id
        runs = speculate(self.model, state.model_state, state.logits, limit, eos_id, chooser, proposer, costs)
        for run in runs:
            record.state = record.state.after(run.tokens, run.state, run.logits)
            record.tokens.extend(run.tokens)
            record.passes += 1
            record.proposed += run.proposed
            record.accepted += len(run.tokens) - 1
            record.seconds += time.perf_counter() - started
            yield from run.tokens
            started = time.perf_counter()
