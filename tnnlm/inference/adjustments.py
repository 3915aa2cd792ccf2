"""Changes of the logits of one sequence by the tokens before: penalties, biases and grammars.

Penalties have the definitions of vLLM: the repetition penalty of CTRL (arXiv 1909.05858, section 4.1) divides
a positive logit and multiplies a negative one of each token that the prompt or the sequence contains, after
which the frequency and presence penalties of OpenAI's API are subtracted for the tokens that were generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tnnlm.inference.generation_state import GenerationState
from tnnlm.inference.grammar import Grammar, GrammarMatcher
from tnnlm.inference.sampling import SamplingParams, sample


class Adjustments:
    """Changes of the logits of one sequence, which depend on no other sequence."""

    def __init__(
        self,
        sampling: SamplingParams,
        vocabulary: int,
        *,
        prompt: Iterable[int] = (),
        bias: Mapping[int, float] | None = None,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        """Begin a sequence.

        Args:
            sampling: Parameters, of which the penalties are used.
            vocabulary: Number of logits V.
            prompt: Tokens of the prompt, which the repetition penalty applies to.
            bias: Values to add to the logits of tokens: id -> bias.
            matcher: Grammar that the sequence follows.
        """
        self._sampling = sampling
        self._matcher = matcher
        self._drawn: set[int] = set()
        self._bias = self._subtracted = self._seen = None
        if bias:
            self._bias = torch.zeros(vocabulary)
            self._bias[list(bias)] = torch.tensor(list(bias.values()))
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._subtracted = torch.zeros(vocabulary)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[[token for token in set(prompt) if token < vocabulary]] = True

    @property
    def active(self) -> bool:
        """Whether any logit may change."""
        parts = (self._bias, self._subtracted, self._seen, self._matcher)
        return any(part is not None for part in parts)

    def apply(self, logits: Tensor) -> None:
        """Change the logits of the next token, (V,), in place."""
        if self._bias is not None:
            logits += self._bias.to(logits.device)
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(self._seen.to(logits.device), penalised, logits, out=logits)
        if self._subtracted is not None:
            logits -= self._subtracted.to(logits.device)
        if self._matcher is not None:
            logits.masked_fill_(self._matcher.forbidden(len(logits)).to(logits.device), -torch.inf)

    def took(self, token: int) -> None:
        """Continue with a token that was sampled.

        Raises:
            UserError: If the grammar can't continue.
        """
        if self._matcher is not None:
            self._matcher.took(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._subtracted is not None:
            self._subtracted[token] += self._sampling.frequency_penalty
            if token not in self._drawn:
                self._drawn.add(token)
                self._subtracted[token] += self._sampling.presence_penalty


def changes_of(
    state: GenerationState, sampling: SamplingParams, vocabulary: int, grammar: Grammar | None
) -> list[Adjustments]:
    """Return the changes of the logits of each row of a state; an empty list if there are none."""
    rows = []
    for index in range(len(state.lengths)):
        prompt = state.history[index] if state.history else ()
        matcher = None if grammar is None else grammar.start()
        rows.append(Adjustments(sampling, vocabulary, prompt=prompt, matcher=matcher))
    return rows if rows and rows[0].active else []


def sample_rows(
    logits: Tensor,
    sampling: SamplingParams,
    generator: torch.Generator | None,
    changes: Sequence[Adjustments],
) -> Tensor:
    """Sample the next token of each row of logits (B, V) with its changes: -> (B,).

    Raises:
        UserError: If the largest logit of a row is not finite, or a grammar can't continue.
    """
    logits = logits.float().clone()
    for changed, row in zip(logits, changes, strict=True):
        row.apply(changed)
    tokens = sample(logits, sampling, generator)
    for token, row in zip(tokens.tolist(), changes, strict=True):
        row.took(token)
    return tokens
