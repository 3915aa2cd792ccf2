"""Prefill of prompts in chunks, on top of what is cached of their beginnings."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.inference.generator import GenerationState, TextGenerator
from tnnlm.serving.logprobs import TokenScore, score_tokens
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.sequence import Prompt, SequenceOutput

CHUNK = 128
"""prompt tokens of one pass"""


class PrefillWorker:
    """Always alone and in the same chunks, so that a prompt's state has the same bits under any load."""

    def __init__(self, generator: TextGenerator, cache: PrefixCache, metrics: Metrics) -> None:
        self.cache = cache
        self._model, self._device = generator.model, generator.device
        self._vocabulary = generator.tokenizer.size
        self._metrics = metrics

    def prefill_chunk(self, prompt: Prompt) -> list[SequenceOutput]:
        """Process a chunk at the most; outputs if the prompt's own tokens are asked for."""
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
        # A copy: the rest of the logits would stay in memory with it.
        prompt.state = GenerationState(state, logits[:, -1].clone(), (prompt.position,), 0.0)
        self._metrics.prompt_tokens.inc(len(chunk))
        if not scored and (prompt.complete or _doubled(prompt.position)):
            self.cache.put(prompt.tokens[: prompt.position], prompt.state)
        return outputs

    def _look_up(self, prompt: Prompt) -> None:
        found = self.cache.longest(prompt.tokens)
        if found:
            prompt.position, prompt.state = found
            prompt.cached = prompt.position
            self._metrics.cached_tokens.inc(prompt.cached)

    def _score(self, prompt: Prompt, chunk: list[int], logits: Tensor) -> list[SequenceOutput]:
        """Log-probabilities of a chunk's tokens from the logits (L, V) after each."""
        scores = []
        if prompt.state is None:
            scores.append(TokenScore(chunk[0], None, ()))
            before, tokens = logits[:-1], chunk[1:]
        else:
            before, tokens = torch.cat((prompt.state.logits, logits[:-1])), chunk
        scores += score_tokens(before[:, : self._vocabulary], tokens, prompt.score_prompt or 0)
        return [
            SequenceOutput(sequence, scores=list(scores), position=prompt.position)
            for sequence in prompt.sequences
        ]


def _doubled(length: int) -> bool:
    """At such lengths a long prompt is kept on the way: prompts that part later share at least half of
    what they could, and one prompt does not fill the cache."""
    chunks, rest = divmod(length, CHUNK)
    return not rest and chunks & (chunks - 1) == 0
