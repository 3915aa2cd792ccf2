"""Proposals from the text itself, and the choice of the number of tokens per pass."""

from __future__ import annotations

import random

import pytest

from tnnlm.inference.speculation_ngram import NgramProposer
from tnnlm.inference.speculation_width import PassCosts


def proposed(proposer: NgramProposer, most: int, costs: PassCosts) -> list[int]:
    width = costs.best_width([proposer.probabilities(most)])
    return proposer.propose(width - 1) if width > 1 else []


def test_continuation_of_the_latest_occurrence_is_proposed() -> None:
    costs = PassCosts(measured=False)
    proposer = NgramProposer([1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 6, 0, 1, 2])
    proposer.extend([3])
    assert proposed(proposer, 2, costs)[:1] == [7]


def test_repeating_text_is_continued_beyond_its_end() -> None:
    costs = PassCosts(measured=False)
    proposer = NgramProposer([1, 2, 3] * 20)
    assert proposed(proposer, 7, costs) == [1, 2, 3, 1, 2, 3, 1]
    assert proposed(proposer, 2, costs) == [1, 2]
    assert proposed(proposer, 0, costs) == []


def test_random_text_ends_proposals() -> None:
    source, costs = random.Random(0), PassCosts(measured=False)
    proposer = NgramProposer([])
    counts = []
    for _ in range(4000):
        proposer.extend([source.randrange(30)])
        counts.append(len(proposed(proposer, 7, costs)))
    assert sum(counts[2000:]) < 60


def test_proposer_rests_on_random_text_and_wakes_where_text_repeats_itself() -> None:
    source, costs = random.Random(0), PassCosts(measured=False)
    proposer = NgramProposer([])
    rests = 0
    for _ in range(2000):
        proposer.extend([source.randrange(30)])
        proposed(proposer, 7, costs)
        rests += proposer.rest() > 0
    assert rests > 1800
    text = [*range(100, 120)] * 20
    for token in text:
        proposer.extend([token])
        proposed(proposer, 7, costs)
    assert proposer.rest() == 0
    assert proposed(proposer, 7, costs) == text[:7]


def test_proposer_rests_if_passes_over_several_tokens_take_too_long() -> None:
    costs = PassCosts((1, 2))
    for _ in range(50):
        costs.observe(1, 1.0)
        costs.observe(2, 3.0)
    proposer = NgramProposer([1, 2, 3] * 20)
    rests = 0
    for token in [1, 2, 3] * 700:
        proposer.extend([token])
        assert proposed(proposer, 7, costs) == []
        rests += proposer.rest() > 0
    assert rests > 1600


def test_tokens_indexed_together_have_the_places_of_single_ones() -> None:
    tokens = [random.Random(0).randrange(9) for _ in range(200)]
    single, together = NgramProposer([]), NgramProposer([])
    for token in tokens:
        single.extend([token])
    together.extend(tokens[:3])
    together._index(tokens[3:120])
    together._index(tokens[120:121])
    together._index(tokens[121:])
    assert together._tokens == single._tokens
    assert together._places == single._places


def test_old_tokens_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnnlm.inference.speculation_ngram._LONGEST", 8)
    costs = PassCosts(measured=False)
    proposer = NgramProposer([1, 2, 3, 4, 5, *range(20, 40)])
    assert len(proposer._tokens) < 16
    proposer.extend([1, 2, 3])
    assert proposed(proposer, 4, costs) == []
    proposer.extend([4, 50, 1, 2, 3])
    assert proposed(proposer, 4, costs)[:1] == [4]


def test_width_with_the_most_tokens_per_time_is_taken() -> None:
    costs = PassCosts(measured=False)
    assert costs.best_width([[]]) == 1
    assert costs.best_width([[0.05] * 7]) == 1
    assert costs.best_width([[1.0] * 7]) == 8
    assert costs.best_width([[1.0] * 2]) == 3
    assert 1 < costs.best_width([[0.6] * 7]) < 8
    assert costs.best_width([[0.3] * 7]) == 2
    assert costs.best_width([[0.3] * 7, [], []]) == 1
    assert costs.best_width([[1.0] * 7, [], [1.0] * 2]) == 8
    costs.per_proposal = 0.5
    assert costs.best_width([[0.6] * 7]) == 1


def test_measured_costs_replace_the_assumed_ones() -> None:
    costs = PassCosts((1, 2, 4))
    for width in costs.widths:  # the first pass of a width sets its code up
        costs.observe(width, 1000.0)
    for _ in range(50):
        costs.observe(1, 1.0)
        costs.observe(2, 3.0)
        costs.observe(4, 1.5)
    assert costs.cost(2) == pytest.approx(3.0, rel=0.01)
    assert costs.cost(4) == pytest.approx(1.5, rel=0.01)
    costs.observe(4, 1000.0)  # a pause of the machine
    assert costs.cost(4) < 1.9
    assert costs.best_width([[0.9] * 3]) == 4


def test_costs_that_are_not_measured_stay() -> None:
    costs = PassCosts((1, 2), measured=False)
    before = costs.cost(2)
    costs.observe(1, 1.0)
    costs.observe(2, 9.0)
    costs.observe_proposals(1, 9.0)
    assert (costs.cost(2), costs.per_proposal) == (before, 0.0)
