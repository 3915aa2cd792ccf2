"""Chunked prefill of prompts, starting from the longest cached prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.inference.generator import GenerationState, TextGenerator
from tnnlm.serving.logprobs import TokenScore, score_tokens
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.sequence import Prompt, SequenceOutput

CHUNK = 128
"""Prompt tokens per chunk."""


class PrefillWorker:
    """Worker that prefills prompts in chunks.

    Each prompt is prefilled alone and in the same chunks, so that its state is bitwise identical under any
    load.
    """

    def __init__(self, generator: TextGenerator, cache: PrefixCache, metrics: Metrics) -> None:
        self.cache = cache
        self._model, self._device = generator.model, generator.device
        self._token_logits = generator.token_logits
        self._metrics = metrics

    def prefill_chunk(self, prompt: Prompt) -> list[SequenceOutput]:
        """Process at most one chunk; return outputs if log-probabilities of the prompt are requested."""
        scored = prompt.score_prompt is not None
        if prompt.state is None and not scored:
            self._look_up(prompt)
        chunk = prompt.tokens[prompt.position : prompt.position + CHUNK]
        if not chunk:
            return []
        state = prompt.state.model_state if prompt.state else self._model.init_state(1)
        tokens = torch.tensor([chunk], device=self._device)
        logits, state = self._model.prefill(tokens, state, keep=None if scored else 1)
        outputs = self._score(prompt, chunk, logits[0]) if scored else []
        prompt.position += len(chunk)
        # A view would keep the logits of the whole chunk in memory.
        prompt.state = GenerationState(state, logits[:, -1].clone(), (prompt.position,), 0.0)
        self._metrics.prompt_tokens.inc(len(chunk))
        if not scored and (prompt.complete or _doubled(prompt.position)):
            self.cache.put(prompt.tokens[: prompt.position], prompt.state, prompt.partition)
        return outputs

    def _look_up(self, prompt: Prompt) -> None:
        found = self.cache.longest(prompt.tokens, prompt.partition)
        if found:
            prompt.position, prompt.state = found
            prompt.cached = prompt.position
            self._metrics.cached_tokens.inc(prompt.cached)

    def _score(self, prompt: Prompt, chunk: list[int], logits: Tensor) -> list[SequenceOutput]:
        """Score the tokens of a chunk, given the logits (L, V) after each of them."""
        scores = []
        if prompt.state is None:
            scores.append(TokenScore(chunk[0], None, ()))
            before, tokens = logits[:-1], chunk[1:]
        else:
            before, tokens = torch.cat((prompt.state.logits, logits[:-1])), chunk
        scores += score_tokens(self._token_logits(before), tokens, prompt.score_prompt or 0)
        return [
            SequenceOutput(sequence, scores=list(scores), position=prompt.position)
            for sequence in prompt.sequences
        ]


def _doubled(length: int) -> bool:
    """Return whether ``length`` is a power of two times the chunk size.

    The state of a long prompt is cached at these lengths, so that a later prompt reuses at least half of a
    common prefix of a chunk or more, and a single prompt doesn't fill the cache.
    """
    chunks, rest = divmod(length, CHUNK)
    return not rest and chunks & (chunks - 1) == 0
