"""Prompts read in chunks, on top of what is cached of their beginnings."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.inference.generator import Context, TextGenerator
from tnnlm.serving.logprobs import TokenScore, score_tokens
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.sequence import Event, Reading

CHUNK = 128
"""prompt tokens of one pass"""


class Reader:
    """Always alone and in the same chunks, so that a prompt's state has the same bits under any load."""

    def __init__(self, generator: TextGenerator, cache: PrefixCache, metrics: Metrics) -> None:
        self.cache = cache
        self._model, self._device = generator.model, generator.device
        self._vocabulary = generator.tokenizer.size
        self._metrics = metrics

    def read_chunk(self, reading: Reading) -> list[Event]:
        """Read on by a chunk at the most; events if the prompt's own tokens are asked for."""
        scored = reading.score_prompt is not None
        if reading.context is None and not scored:
            self._look_up(reading)
        chunk = reading.prompt[reading.position : reading.position + CHUNK]
        if not chunk:
            return []
        state = reading.context.state if reading.context else self._model.init_state(1)
        tokens = torch.tensor([chunk], device=self._device)
        logits, state = self._model.prefill(tokens, state, keep=None if scored else 1)
        events = self._score(reading, chunk, logits[0]) if scored else []
        reading.position += len(chunk)
        # A copy: the rest of the logits would stay in memory with it.
        reading.context = Context(state, logits[:, -1].clone(), (reading.position,), 0.0)
        self._metrics.prompt_tokens.inc(len(chunk))
        if not scored and (reading.whole or _doubled(reading.position)):
            self.cache.put(reading.prompt[: reading.position], reading.context)
        return events

    def _look_up(self, reading: Reading) -> None:
        found = self.cache.longest(reading.prompt)
        if found:
            reading.position, reading.context = found
            reading.cached = reading.position
            self._metrics.cached_tokens.inc(reading.cached)

    def _score(self, reading: Reading, chunk: list[int], logits: Tensor) -> list[Event]:
        """Log-probabilities of a chunk's tokens from the logits (L, V) after each."""
        scores = []
        if reading.context is None:
            scores.append(TokenScore(chunk[0], None, ()))
            before, tokens = logits[:-1], chunk[1:]
        else:
            before, tokens = torch.cat((reading.context.logits, logits[:-1])), chunk
        scores += score_tokens(before[:, : self._vocabulary], tokens, reading.score_prompt or 0)
        return [Event(job, scores=list(scores), position=reading.position) for job in reading.jobs]


def _doubled(length: int) -> bool:
    """At such lengths a long prompt is kept on the way: prompts that part later share at least half of
    what they could, and one prompt does not fill the cache."""
    chunks, rest = divmod(length, CHUNK)
    return not rest and chunks & (chunks - 1) == 0
