"""Speculative decoding: several proposed tokens are checked in one pass over the weights (arXiv 2211.17192).

A decoding step takes the time of reading the weights once, and a pass over k tokens little more. A proposer
predicts the next tokens, a pass computes the logits after each of them, and the longest prefix is kept that
decoding would have produced. The state after it is one of those that the pass returned, so that nothing is
computed again. What is generated does not depend on the proposals: greedy text is the same, and sampled
tokens have the same distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tnnlm.inference.decoder import DecoderModel
from tnnlm.inference.sampling import SamplingParams, probabilities, sample, sample_from
from tnnlm.inference.speculation_ngram import NgramProposer
from tnnlm.inference.speculation_width import PassCosts
from tnnlm.models.causal_lm import ModelState


class Proposer(Protocol):
    """Source of proposed tokens for one sequence."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence."""
        ...

    def rest(self) -> int:
        """Return the number of next tokens for which nothing will be proposed, which may come together."""
        ...

    def probabilities(self, most: int) -> list[float]:
        """Return the probability that each of up to ``most`` proposals is correct, if those before it are."""
        ...

    def propose(self, count: int) -> list[int]:
        """Return up to ``count`` tokens that may follow the sequence, no more than probabilities."""
        ...

    def distributions(self) -> Tensor | None:
        """Return the distributions (K, V) of the latest proposal; None if it isn't random."""
        ...


class Speculation(Protocol):
    """Kind of speculation, with the costs that were measured; each sequence has a separate proposer."""

    for_batches: bool
    """Whether batches speculate, too; their proposals must not be random."""

    def start(
        self, history: Iterable[int], sampling: SamplingParams, generator: torch.Generator | None
    ) -> Proposer:
        """Return a proposer for a sequence with these tokens so far.

        ``generator`` is the source of random proposals.
        """
        ...

    def costs(self, rows: int, sampling: SamplingParams) -> PassCosts:
        """Return the costs of passes for batches of this size, which are observed."""
        ...


class NgramSpeculation:
    """Proposals from the text itself (:mod:`tnnlm.inference.speculation_ngram`)."""

    for_batches = True

    def __init__(self, new_costs: Callable[[], PassCosts] = PassCosts) -> None:
        """Take a function that returns costs that have not been measured."""
        self._new_costs = new_costs
        self._costs: dict[int, PassCosts] = {}

    def start(
        self, history: Iterable[int], sampling: SamplingParams, generator: torch.Generator | None
    ) -> Proposer:
        """Return a proposer for a sequence with these tokens so far."""
        return NgramProposer(history)

    def costs(self, rows: int, sampling: SamplingParams) -> PassCosts:
        """Return the costs of passes for batches of about this size."""
        return self._costs.setdefault(rows.bit_length(), self._new_costs())


class Chooser(Protocol):
    """Source of the tokens of one sequence, from the logits of the model."""

    def choose(self, logits: Tensor) -> int:
        """Return the token after logits (1, V)."""
        ...

    def check(self, logits: Tensor, proposed: Sequence[int], drawn_from: Tensor | None) -> list[int]:
        """Return the tokens after logits (K, V), up to the first that isn't the proposed one.

        Args:
            logits: Logits before each of the proposed tokens.
            proposed: Proposed tokens, K of them.
            drawn_from: Distributions (K, V) that they were sampled from; None if they are not random.
        """
        ...


class Sampler:
    """Chooser that samples, or takes the most likely tokens."""

    def __init__(
        self,
        token_logits: Callable[[Tensor], Tensor],
        sampling: SamplingParams,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take the function that returns logits of the tokenizer's ids, and the parameters of sampling."""
        self._token_logits = token_logits
        self._sampling = sampling
        self._generator = generator

    def choose(self, logits: Tensor) -> int:
        """Return the token after logits (1, V)."""
        return int(sample(self._token_logits(logits), self._sampling, self._generator))

    def check(self, logits: Tensor, proposed: Sequence[int], drawn_from: Tensor | None) -> list[int]:
        """Return the tokens after logits (K, V), up to the first that isn't the proposed one.

        Without ``drawn_from`` a token is sampled from the model's distribution p and compared. It is the
        proposed one with probability p, and otherwise it has the distribution p without that token, as
        rejection sampling requires. One random number is taken per token, as without speculation, so that
        the text for a seed is the same, too.
        """
        logits = self._token_logits(logits)
        if self._sampling.greedy:
            chosen = sample(logits, self._sampling).tolist()
            return chosen[: _agreement(chosen, proposed) + 1]
        if drawn_from is not None:
            return self._check_drawn(logits, proposed, drawn_from)
        tokens: list[int] = []
        for row, token in enumerate(proposed):
            tokens.append(int(sample(logits[row : row + 1], self._sampling, self._generator)))
            if tokens[-1] != token:
                break
        return tokens

    def _check_drawn(self, logits: Tensor, proposed: Sequence[int], drawn_from: Tensor) -> list[int]:
        p = probabilities(logits, self._sampling)
        tokens: list[int] = []
        for row, token in enumerate(proposed):
            part, drawn = slice(row, row + 1), p.new_tensor([token], dtype=torch.long)
            tokens.append(int(accept_or_draw(p[part], drawn_from[part], drawn, self._generator)))
            if tokens[-1] != token:
                break
        return tokens


def accept_or_draw(p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return tokens (B,) with distribution p (B, V), from ``tokens`` (B,) with distribution q (B, V).

    A token t is kept with probability min(1, p(t) / q(t)), and otherwise replaced by one sampled from
    max(p - q, 0), normalised (arXiv 2211.17192, theorem 1).
    """
    index = tokens[:, None]
    uniform = torch.rand(p.shape[0], 1, dtype=p.dtype, device=p.device, generator=generator)
    kept = (uniform * q.gather(1, index) < p.gather(1, index)).squeeze(1)
    if bool(kept.all()):
        return tokens
    rest = (p - q).clamp(min=0)
    # Where p equals q up to rounding, nothing is left, and a token of p is as good.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)
    return torch.where(kept, tokens, sample_from(rest, generator))


class Run(NamedTuple):
    """Result of one pass over the weights: its tokens, of which there is at least one."""

    tokens: list[int]
    state: ModelState
    """State after the last of the tokens."""
    logits: Tensor
    """Logits of the next token, (1, V)."""
    proposed: int
    """Number of tokens that were proposed; all tokens but the first are proposed ones that were accepted."""


def speculate(
    model: DecoderModel,
    state: ModelState,
    logits: Tensor,
    limit: int,
    eos_id: int,
    chooser: Chooser,
    proposer: Proposer,
    costs: PassCosts,
) -> Iterator[Run]:
    """Decode one sequence in passes over one or several tokens.

    Args:
        model: Converted model.
        state: State of the sequence, with one row.
        logits: Logits of its next token, (1, V).
        limit: Maximum number of tokens.
        eos_id: Token that ends the sequence and is not part of it.
        chooser: Source of the tokens.
        proposer: Source of proposed tokens, which knows the sequence so far.
        costs: Costs of passes, which are observed.

    Yields:
        The tokens of each pass.
    """
    chosen: int | None = None
    done = 0
    while done < limit:
        if chosen is None and (rest := min(proposer.rest(), limit - done)):
            found, state, logits = yield from _single_steps(model, state, logits, rest, eos_id, chooser)
            if len(found) < rest:
                return
            proposer.extend(found)
            done += rest
            continue
        started = time.perf_counter()
        with torch.inference_mode():
            token = chooser.choose(logits) if chosen is None else chosen
            if token == eos_id:
                return
            proposer.extend([token])
            known = proposer.probabilities(min(limit - done, costs.widths[-1]) - 1)
            width = costs.best_width([known]) if known else 1
            proposed: list[int] = []
            if width > 1:
                asked = time.perf_counter()
                proposed = proposer.propose(width - 1)
                started += time.perf_counter() - asked  # not part of the pass
            if proposed:
                accepted, chosen, state, logits = _checked(
                    model, state, [token, *proposed], eos_id, chooser, proposer
                )
            else:
                logits, state = model.step(torch.tensor([token], device=logits.device), state)
                chosen, accepted = None, 0
        # Choosing tokens takes part of the time, and a pass over several tokens does it once.
        costs.observe(1 + len(proposed), time.perf_counter() - started)
        done += 1 + accepted
        yield Run([token, *proposed[:accepted]], state, logits, len(proposed))


def _checked(
    model: DecoderModel,
    state: ModelState,
    tokens: list[int],
    eos_id: int,
    chooser: Chooser,
    proposer: Proposer,
) -> tuple[int, int | None, ModelState, Tensor]:
    """Check the proposals that follow the first of ``tokens`` in one pass, and tell the proposer the result.

    Returns:
        The number of accepted ones, the token after those if it has been chosen, and state and logits there.
    """
    proposed = tokens[1:]
    given = torch.tensor([tokens], device=model.embedding.weight.device)
    logits, states = model.steps(given, state)
    found = chooser.check(logits[0, :-1], proposed, proposer.distributions())
    accepted = _agreement(found, proposed)
    if eos_id in found[:accepted]:
        accepted = found.index(eos_id)
    proposer.extend(proposed[:accepted])
    chosen = found[accepted] if accepted < len(found) else None
    return accepted, chosen, states[accepted], logits[:, accepted]


def _single_steps(
    model: DecoderModel, state: ModelState, logits: Tensor, count: int, eos_id: int, chooser: Chooser
) -> Generator[Run, None, tuple[list[int], ModelState, Tensor]]:
    """Decode up to ``count`` tokens without proposals, at the cost of decoding without speculation.

    Returns:
        The tokens, fewer if the text ends, and state and logits after the last one.
    """
    tokens: list[int] = []
    while len(tokens) < count:
        with torch.inference_mode():
            token = chooser.choose(logits)
            if token == eos_id:
                break
            logits, state = model.step(torch.tensor([token], device=logits.device), state)
        tokens.append(token)
        yield Run([token], state, logits, 0)
    return tokens, state, logits


def _agreement(tokens: Sequence[int], proposed: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    for count, (token, other) in enumerate(zip(tokens, proposed, strict=False)):
        if token != other:
            return count
    return min(len(tokens), len(proposed))
