"""Speculative decoding of several sequences at a time, each of which accepts as many tokens as are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tnnlm.inference.decoder import DecoderModel
from tnnlm.inference.speculation import Proposer
from tnnlm.inference.speculation_width import PassCosts
from tnnlm.models.causal_lm import ModelState

Choose = Callable[[Tensor], list[int]]
"""Function that returns the tokens after logits (R, V)."""


class CheckedPass(NamedTuple):
    """Result of a pass over one or several tokens of each row."""

    accepted: list[int]
    """Number of proposed tokens of each row that were right."""
    chosen: list[int | None]
    """Token after those, which was not the proposed one; None if it has not been chosen."""
    state: ModelState
    """State of each row after its last accepted token."""
    logits: Tensor
    """Logits of the next token of each row, (B, V)."""


@dataclass
class SpeculatedRow:
    """Sequence of a batch."""

    proposer: Proposer
    tokens: list[int] = field(default_factory=list)
    chosen: int | None = None
    """Token after those, if it has been chosen."""
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    state: ModelState | None = None
    """State after the last token, at the end."""
    logits: Tensor | None = None
    """Logits of the next token, (1, V), at the end."""


def checked_pass(
    model: DecoderModel, state: ModelState, rows: Sequence[Sequence[int]], choose: Choose, eos_id: int
) -> CheckedPass:
    """Check the proposed tokens of several rows in one pass over the weights.

    Args:
        model: Converted model.
        state: State of the rows.
        rows: Next token of each row, followed by those that are proposed, if any.
        choose: Source of the tokens, which is called for the rows that have accepted all tokens so far.
        eos_id: Token that ends a sequence; it is never accepted, but chosen.
    """
    width = max(map(len, rows))
    device = model.embedding.weight.device
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    if width == 1:
        logits, state = model.step(tokens[:, 0], state)
        return CheckedPass([0] * len(rows), [None] * len(rows), state, logits)
    logits, states = model.steps(tokens, state)
    accepted, chosen = [0] * len(rows), list[int | None]([None] * len(rows))
    alive = list(range(len(rows)))
    for place in range(1, width):
        alive = [row for row in alive if len(rows[row]) > place and chosen[row] is None]
        if not alive:
            break
        for row, token in zip(alive, choose(logits[alive, place - 1]), strict=True):
            if token == rows[row][place] != eos_id:
                accepted[row] = place
            else:
                chosen[row] = token
    index = torch.tensor(accepted, device=device)
    return CheckedPass(
        accepted, chosen, states_at(states, accepted), logits[torch.arange(len(rows), device=device), index]
    )


def states_at(states: Sequence[ModelState], places: Sequence[int]) -> ModelState:
    """Return the state of each row after a number of tokens: of row b the one in ``states[places[b]]``."""
    used = sorted(set(places))
    if len(used) == 1:
        return states[used[0]]
    device = states[used[0]].tensors[0].device
    groups = [[row for row, place in enumerate(places) if place == each] for each in used]
    parts = [
        states[place].select(torch.tensor(group, device=device))
        for place, group in zip(used, groups, strict=True)
    ]
    order = torch.tensor([row for group in groups for row in group], device=device).argsort()
    return ModelState.join(parts).select(order)


def speculate_batch(
    model: DecoderModel,
    state: ModelState,
    logits: Tensor,
    limit: int,
    eos_id: int,
    choose: Choose,
    proposers: Sequence[Proposer],
    costs: PassCosts,
) -> list[SpeculatedRow]:
    """Decode several sequences, each up to ``limit`` tokens or the end-of-document token.

    Arguments are those of :func:`tnnlm.inference.speculation.speculate`, with a row per sequence. Proposals
    must not be random.
    """
    rows = [SpeculatedRow(proposer) for proposer in proposers]
    batch = _Batch(rows, state, logits)
    batch.keep([limit > 0] * len(rows))
    while batch.rows:
        free = [place for place, row in enumerate(batch.rows) if row.chosen is None]
        for place, token in zip(free, choose(batch.logits[free]) if free else (), strict=True):
            batch.rows[place].chosen = token
        batch.keep([row.chosen != eos_id for row in batch.rows])
        if batch.rows:
            _run_pass(model, batch, limit, eos_id, choose, costs)
            batch.keep([len(row.tokens) < limit for row in batch.rows])
    return rows


@dataclass
class _Batch:
    """Sequences in progress with their states."""

    rows: list[SpeculatedRow]
    state: ModelState
    logits: Tensor

    def keep(self, kept: Sequence[bool]) -> None:
        """Continue some sequences, and give the others their last state."""
        if all(kept):
            return
        for place, row in enumerate(self.rows):
            if not kept[place]:
                row.state, row.logits = self._select([place])
        places = [place for place, keeps in enumerate(kept) if keeps]
        self.rows = [self.rows[place] for place in places]
        self.state, self.logits = self._select(places)

    def _select(self, places: list[int]) -> tuple[ModelState, Tensor]:
        index = torch.tensor(places, dtype=torch.long, device=self.logits.device)
        return self.state.select(index), self.logits[index]


def _run_pass(
    model: DecoderModel, batch: _Batch, limit: int, eos_id: int, choose: Choose, costs: PassCosts
) -> None:
    """Append the chosen token of each sequence, and those of its proposals that are right."""
    fed, probabilities = [], []
    for row in batch.rows:
        assert row.chosen is not None
        fed.append([row.chosen])
        row.proposer.extend(fed[-1])
        most = min(limit - len(row.tokens), costs.widths[-1]) - 1
        probabilities.append(row.proposer.probabilities(most))
    width = costs.best_width(probabilities)
    for row, tokens, known in zip(batch.rows, fed, probabilities, strict=True):
        if count := min(width - 1, len(known)):
            tokens += row.proposer.propose(count)
    started = time.perf_counter()
    found = checked_pass(model, batch.state, fed, choose, eos_id)
    costs.observe(max(map(len, fed)), time.perf_counter() - started)
    batch.state, batch.logits = found.state, found.logits
    for row, tokens, accepted, chosen in zip(batch.rows, fed, found.accepted, found.chosen, strict=True):
        row.tokens += tokens[: 1 + accepted]
        row.proposer.extend(tokens[1 : 1 + accepted])
        row.passes += 1
        row.proposed += len(tokens) - 1
        row.accepted += accepted
        row.chosen = chosen
