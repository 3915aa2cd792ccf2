"""Penalties and min-p: their definitions, and the same tokens alone, in a batch, and from the server."""

from __future__ import annotations

import httpx2
import pytest
import torch

from tests.support.servers import Running
from tnnlm.errors import UserError
from tnnlm.inference.adjustments import Adjustments
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams, probabilities
from tnnlm.inference.speculation import Speculation
from tnnlm.serving.sampler import SequenceSampler, sample_batch

PENALISED = SamplingParams(temperature=0, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.3)


def changed(
    logits: torch.Tensor, sampling: SamplingParams, prompt: list[int], drawn: list[int]
) -> torch.Tensor:
    """Return the logits after a prompt and generated tokens, by the definitions, in Python."""
    out = logits.clone()
    for token in {*prompt, *drawn}:
        value = float(out[token])
        penalty = sampling.repetition_penalty
        out[token] = value / penalty if value > 0 else value * penalty
    for token in set(drawn):
        out[token] -= sampling.frequency_penalty * drawn.count(token) + sampling.presence_penalty
    return out


def test_penalties_have_their_definitions() -> None:
    logits, prompt, drawn = torch.randn(40), [3, 3, 7], [7, 9, 9, 9, 11]
    own = Adjustments(PENALISED, 40, prompt=prompt)
    for token in drawn:
        own.took(token)
    found = logits.clone()
    own.apply(found)
    torch.testing.assert_close(found, changed(logits, PENALISED, prompt, drawn))
    assert not Adjustments(SamplingParams(min_p=0.5), 40, prompt=prompt).active
    biased = Adjustments(SamplingParams(), 40, bias={5: 2.0})
    found = logits.clone()
    biased.apply(found)
    assert (found - logits).nonzero()[:, 0].tolist() == [5]


def test_transformers_has_the_same_definitions() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(1, 50)
    prompt = [1, 4, 4, 30]
    own = Adjustments(SamplingParams(repetition_penalty=1.3), 50, prompt=prompt)
    found = logits[0].clone()
    own.apply(found)
    expected = process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt]), logits.clone())
    torch.testing.assert_close(found, expected[0])
    for params in (
        {"min_p": 0.07},
        {"min_p": 0.02, "top_p": 0.9},
        {"min_p": 1.0},
        {"min_p": 0.01, "top_k": 4},
    ):
        p = probabilities(logits, SamplingParams(temperature=0.8, **params))[0]
        scores = logits.double() / 0.8
        if "top_k" in params:
            scores = process.TopKLogitsWarper(params["top_k"])(None, scores)
        if "top_p" in params:
            scores = process.TopPLogitsWarper(params["top_p"])(None, scores)
        scores = process.MinPLogitsWarper(params["min_p"])(None, scores)
        torch.testing.assert_close(p, scores.softmax(-1)[0])
        row = SequenceSampler(SamplingParams(temperature=0.8, **params), 50, seed=1)
        assert {sample_batch(logits, [row])[0] for _ in range(200)} <= {*p.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("min_p", -0.1), ("min_p", 1.5), ("min_p", float("nan")), ("repetition_penalty", 0.0)),
        *(("repetition_penalty", float("inf")), ("presence_penalty", 2.5), ("frequency_penalty", -3.0)),
    ],
)
def test_values_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{setting} "):
        SamplingParams(**{setting: value})


def test_generation_follows_the_definitions_everywhere(generator: TextGenerator, server: Running) -> None:
    prompts, n = ["the quick the quick", "a lazy dog"], 25
    expected = []
    for prompt in prompts:
        ids = generator.tokenizer.encode(prompt)
        drawn: list[int] = []
        state = generator.prefill_tokens([ids])
        while len(drawn) < n:
            logits = generator.token_logits(state.logits)[0]
            token = int(changed(logits, PENALISED, ids, drawn).argmax())
            if token == generator.tokenizer.eos_id:
                break
            drawn.append(token)
            state = generator.prefill_tokens([[token]], state)
        expected.append(drawn)
    single = generator.stream(generator.prefill([prompts[0]]), n, PENALISED)
    assert "".join(single[1]) == single[0].text
    assert single[0].tokens == expected[0]
    assert [
        record.tokens for record in generator.generate(generator.prefill(prompts), n, PENALISED)
    ] == expected
    plain = generator.generate(generator.prefill(prompts), n, SamplingParams(temperature=0))
    assert [record.tokens for record in plain] != expected
    body = {"prompt": prompts, "max_tokens": n, "temperature": 0, "repetition_penalty": 1.4}
    body |= {"presence_penalty": 0.6, "frequency_penalty": 0.3}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    texts = [generator.tokenizer.decode(drawn, started=True) for drawn in expected]
    assert [choice["text"] for choice in answer["choices"]] == texts


def test_nothing_is_proposed_with_penalties(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = generator.prefill(["the quick the quick"])
    expected = "".join(generator.stream(state, 20, PENALISED)[1])
    monkeypatch.setattr(generator, "speculation", Speculation.__new__(Speculation))
    assert "".join(generator.stream(state, 20, PENALISED)[1]) == expected
