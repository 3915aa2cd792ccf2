"""Sampling per row: the same distribution as the plain sampler, independent of the other rows."""

from __future__ import annotations

import math

import pytest
import torch

from tnnlm.inference.sampling import SamplingParams, sample, tempered
from tnnlm.serving.logprobs import score_tokens
from tnnlm.serving.sampler import NO_TOKEN, SequenceSampler, least_kept, sample_batch

SETTINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.6),
    SamplingParams(temperature=1, top_k=40, top_p=0.9),
    SamplingParams(temperature=1, top_k=10_000, top_p=0.999),
]
PENALISED = [
    SamplingParams(temperature=1, min_p=0.02),
    SamplingParams(temperature=0, repetition_penalty=1.7),
    SamplingParams(temperature=1, min_p=0.1, presence_penalty=1, frequency_penalty=0.5, top_k=9),
]


def samplers(settings: list[SamplingParams], vocabulary: int, seed: int) -> list[SequenceSampler]:
    return [SequenceSampler(s, vocabulary, seed=seed, index=i) for i, s in enumerate(settings)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies_are_those_of_the_plain_sampler(settings: SamplingParams) -> None:
    logits = 2 * torch.randn(1, 50)
    n = 20_000
    rows = samplers([settings] * n, 50, 0)
    drawn = torch.tensor(sample_batch(logits.expand(n, -1), rows)).bincount(minlength=50) / n
    plain = (
        sample(logits.expand(n, -1), settings, torch.Generator().manual_seed(0)).bincount(minlength=50) / n
    )
    assert (drawn - plain).abs().max() < 0.02
    assert not ((drawn > 0) & (plain == 0) & (drawn > 1e-3)).any()


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_a_wide_vocabulary_is_truncated_exactly(scale: float) -> None:
    # The distribution is nearly uniform, so the nucleus is wider than the tokens sorted first.
    logits = scale * torch.randn(1, 6000)
    for settings in SETTINGS[2:]:
        chances = (logits / settings.temperature).double().softmax(-1)[0]
        order = chances.argsort(descending=True)
        if settings.top_k:
            order = order[: settings.top_k]
        mass = chances[order] / chances[order].sum()
        kept = set(order[mass.cumsum(0) - mass < settings.top_p].tolist())
        scaled = tempered(logits, settings.temperature)
        assert set((scaled >= least_kept(scaled, [settings])).nonzero()[:, 1].tolist()) == kept
        assert set(sample_batch(logits.expand(300, -1), samplers([settings] * 300, 6000, 1))) <= kept


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 100.0])
def test_any_temperature_is_finite(temperature: float) -> None:
    logits = torch.tensor([[3.0, 5.0, -4.0]])
    settings = SamplingParams(temperature=temperature, top_p=0.9)
    tokens = {*sample_batch(logits, samplers([settings], 3, 0)), *sample(logits, settings).tolist()}
    assert tokens <= ({0, 1, 2} if temperature > 1 else {1})


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    settings = 4 * [*SETTINGS, *PENALISED]  # more than are sampled at once
    logits = torch.randn(len(settings), 3000)
    together = [sample_batch(logits, rows) for rows in [samplers(settings, 3000, 7)] for _ in range(5)]
    alone = samplers(settings, 3000, 7)
    for tokens in together:
        for i, token in enumerate(tokens):
            assert sample_batch(logits[i : i + 1], [alone[i]]) == [token]


def test_seeds() -> None:
    logits = torch.zeros(1, 1000)

    def run(seed: int | None, index: int = 0) -> list[int]:
        row = SequenceSampler(SamplingParams(temperature=1), 1000, seed=seed, index=index)
        return [sample_batch(logits, [row])[0] for _ in range(5)]

    assert run(3) == run(3)
    assert run(-1) == run(-1)
    assert len({tuple(run(*args)) for args in ((3,), (4,), (3, 1), (None,), (None,))}) == 5


def test_bias_and_penalties() -> None:
    logits = torch.tensor([[3.0, 2.5, 1.0]])
    greedy = SamplingParams(temperature=0)
    assert sample_batch(logits, [SequenceSampler(greedy, 3, bias={2: 5.0})]) == [2]
    row = SequenceSampler(SamplingParams(temperature=0, frequency_penalty=0.4), 3)
    assert [sample_batch(logits, [row])[0] for _ in range(4)] == [0, 0, 1, 0]
    row = SequenceSampler(SamplingParams(temperature=0, presence_penalty=1.0), 3)
    assert [sample_batch(logits, [row])[0] for _ in range(4)] == [0, 1, 0, 0]
    assert logits.tolist() == [[3.0, 2.5, 1.0]]


def test_logits_that_are_not_finite_fail_only_their_row() -> None:
    logits = torch.randn(5, 40)
    logits[1, 3], logits[2, 4] = math.nan, math.inf
    logits[3, :39] = -math.inf
    settings = SamplingParams(temperature=1, top_k=3, top_p=0.9)
    rows = samplers([settings] * 5, 40, 0)
    tokens = sample_batch(logits, rows)
    assert tokens[1:4] == [NO_TOKEN, NO_TOKEN, 39]
    alone = samplers([settings] * 5, 40, 0)
    assert [tokens[0], tokens[4]] == [sample_batch(logits[i : i + 1], [alone[i]])[0] for i in (0, 4)]


def test_greedy_parameters_and_any_top_k() -> None:
    logits = torch.randn(1, 40)
    best = int(logits.argmax())
    assert sample_batch(logits, samplers([SamplingParams(temperature=5, top_p=0)], 40, 0)) == [best]
    for k in (-1, 2**63 - 1, 2**80):
        settings = SamplingParams(temperature=2, top_k=k)
        usual = sample_batch(logits, samplers([SamplingParams(temperature=2)], 40, 0))
        assert sample_batch(logits, samplers([settings], 40, 0)) == usual


def test_ids_without_a_token_are_not_scored() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    (score,) = score_tokens(logits, [2], 3)
    assert [token for token, _ in score.top] == [2, 0]
    assert sum(math.exp(value) for _, value in score.top) == pytest.approx(1)


def test_scores_are_log_probabilities() -> None:
    logits = torch.randn(2, 9)
    expected = logits.double().log_softmax(-1)
    first, second = score_tokens(logits, [4, 8], 3)
    assert first.logprob == pytest.approx(expected[0, 4].item())
    assert second.token == 8
    assert [token for token, _ in second.top] == expected[1].argsort(descending=True)[:3].tolist()
    assert score_tokens(logits[:1], [4], 0)[0].top == ()
