"""Proposals from a smaller model with the same tokenizer, the draft model (arXiv 2211.17192).

The draft model takes a step per proposed token. It keeps the state after each, and continues from the one
after the last accepted token. Where its proposals are not worth their time, it proposes a token from time to
time only, and processes those in between together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tnnlm.inference.decoder import DecoderModel
from tnnlm.inference.sampling import SamplingParams, probabilities, sample_from
from tnnlm.inference.speculation_width import PassCosts

_CHUNK = 512
"""Tokens that the draft model processes in parallel; it bounds memory."""
_PROBE = 64
"""Number of tokens without a proposal after which one is made."""
_PRIOR, _WEIGHT, _KEPT = 0.7, 4.0, 0.96
"""Share of accepted tokens before any was observed, number of observations that it counts as, and weight of
an observation relative to the next one."""


class DraftSpeculation:
    """Proposals from a draft model, for one sequence at a time."""

    for_batches = False

    def __init__(
        self,
        model: DecoderModel,
        token_logits: Callable[[Tensor], Tensor],
        relative_cost: float,
        eos_id: int,
        costs: tuple[PassCosts, PassCosts],
    ) -> None:
        """Take the draft model.

        Args:
            model: Draft model, on the device of the model that checks its proposals.
            token_logits: Function that returns the logits of the tokenizer's ids from those of the model.
            relative_cost: Time of a step of the draft model in steps of the other one.
            eos_id: Token that ends a sequence.
            costs: Costs of passes in greedy decoding and in sampling. The latter must not be measured if a
                seed is to give the same text each time, because sampled text depends on the proposals.
        """
        self.model = model
        self.token_logits = token_logits
        self.eos_id = eos_id
        self._costs = costs
        for each in costs:
            each.per_proposal = relative_cost

    def start(
        self, history: Iterable[int], sampling: SamplingParams, generator: torch.Generator | None
    ) -> DraftProposer:
        """Return a proposer for a sequence with these tokens so far."""
        return DraftProposer(self, history, sampling, generator)

    def costs(self, rows: int, sampling: SamplingParams) -> PassCosts:
        """Return the costs of passes over a single row."""
        greedy, sampled = self._costs
        return greedy if sampling.greedy else sampled


class DraftProposer:
    """Proposer for one sequence."""

    def __init__(
        self,
        draft: DraftSpeculation,
        history: Iterable[int],
        sampling: SamplingParams,
        generator: torch.Generator | None,
    ) -> None:
        self._draft = draft
        self._costs = draft.costs(1, sampling)
        self._sampling = sampling
        self._generator = generator
        self._waiting = list(history)
        self._states = [draft.model.init_state(1)]
        self._proposed: list[int] = []
        self._drawn_from: list[Tensor] = []
        self._idle = 0
        self._hits, self._seen = _WEIGHT * _PRIOR, _WEIGHT

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence; the first ones after a proposal are those that were accepted."""
        if not self._proposed:
            self._waiting.extend(tokens)
            return
        accepted, offered = len(tokens), len(self._proposed)
        tried = min(accepted + 1, offered)
        self._hits = _KEPT**tried * self._hits + accepted
        self._seen = _KEPT**tried * self._seen + tried
        # The last proposed token has not been processed.
        last = min(accepted, len(self._states) - 1)
        self._states = [self._states[last]]
        self._waiting = list(tokens[last:])
        self._proposed = []

    def rest(self) -> int:
        """Return 0: a token may be proposed at any time."""
        return 0

    def probabilities(self, most: int) -> list[float]:
        """Return the probability that each of up to ``most`` proposals is correct, if those before it are."""
        self._idle += 1
        if self._idle >= _PROBE:
            return [1.0] * min(most, 1)
        return [self._hits / self._seen] * most

    def propose(self, count: int) -> list[int]:
        """Return up to ``count`` tokens that may follow the sequence."""
        self._idle = 0
        logits = self._process_waiting()
        started = time.perf_counter()
        self._drawn_from = []
        while True:
            self._proposed.append(self._draw(logits))
            if len(self._proposed) == count or self._proposed[-1] == self._draft.eos_id:
                break
            token = torch.tensor(self._proposed[-1:], device=logits.device)
            logits, state = self._draft.model.step(token, self._states[-1])
            self._states.append(state)
        self._costs.observe_proposals(len(self._proposed) - 1, time.perf_counter() - started)
        return list(self._proposed)

    def distributions(self) -> Tensor | None:
        """Return the distributions (K, V) of the latest proposal; None if it is greedy."""
        return torch.cat(self._drawn_from) if self._drawn_from else None

    def _process_waiting(self) -> Tensor:
        """Return the logits (1, V) after all tokens of the sequence, of which one at least is unprocessed."""
        model, state = self._draft.model, self._states[-1]
        tokens = torch.tensor([self._waiting], device=model.embedding.weight.device)
        if tokens.shape[1] == 1:
            logits, state = model.step(tokens[:, 0], state)
        else:
            for chunk in tokens.split(_CHUNK, dim=1):
                last, state = model.prefill(chunk, state, keep=1)
                logits = last[:, 0]
        self._states, self._waiting = [state], []
        return logits

    def _draw(self, logits: Tensor) -> int:
        logits = self._draft.token_logits(logits)
        if self._sampling.greedy:
            return int(logits.argmax(-1))
        p = probabilities(logits, self._sampling)
        self._drawn_from.append(p)
        return int(sample_from(p, self._generator))
