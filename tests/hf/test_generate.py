"""``generate()`` of Transformers returns the same tokens as the generator of this package."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.hf_folders import Opened, own_logits
from tnnlm.inference.sampling import SamplingParams

PROMPTS = [
    "The",
    "some words",
    "The first words, some more",
    "1, 2, 3",
    "x",
    "and then the last words of all;",
]
GREEDY = {"do_sample": False, "eos_token_id": None}


def own_greedy(opened: Opened, prompt: str, n: int) -> list[int]:
    """Return greedy tokens of this package, which stops at the end token as ``generate()`` does."""
    record, pieces = opened.own.stream(opened.own.prefill([prompt]), n, SamplingParams(temperature=0))
    assert "".join(pieces) == record.text
    return record.tokens


def new_tokens(opened: Opened, prompts: list[str], **options: Any) -> Tensor:
    inputs = opened.tokenizer(prompts, return_tensors="pt", padding=True)
    return opened.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def test_2000_greedy_tokens_equal_those_of_this_package(opened: Opened) -> None:
    expected = own_greedy(opened, "The first", 2000)
    inputs = opened.tokenizer("The first", return_tensors="pt")
    out = opened.model.generate(
        **inputs, max_new_tokens=2000, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    found = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(expected) == 2000
    assert len(set(expected)) > 10
    assert found == expected
    state = opened.own.prefill(["The first"])
    logits = own_logits(opened, torch.tensor([expected[:-1]]), state.model_state)
    written = torch.stack(out.logits, dim=1)[0, 1:]
    torch.testing.assert_close(written, logits[0], rtol=1e-3, atol=1e-3)


def test_end_token_stops_generation(balanced: Opened) -> None:
    # The tenth generated token is declared to be the end token.
    expected = own_greedy(balanced, "The", 30)
    stop = expected[9]
    found = new_tokens(balanced, ["The"], max_new_tokens=30, do_sample=False, eos_token_id=stop)[0].tolist()
    assert found == expected[: expected.index(stop) + 1]


def test_tokens_unknown_to_the_tokenizer_are_never_generated(balanced: Opened) -> None:
    size = balanced.own.tokenizer.size
    assert size < balanced.inner.config.vocab_size
    torch.manual_seed(0)
    found = new_tokens(
        balanced, ["The"] * 4, max_new_tokens=40, do_sample=True, temperature=50.0, top_k=0, eos_token_id=None
    )
    assert int(found.max()) < size


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_runs(opened: Opened, side: str) -> None:
    prompts = [*PROMPTS, "words of all", "caf\u00e9s."]
    alone = [new_tokens(opened, [prompt], max_new_tokens=20, **GREEDY)[0] for prompt in prompts]
    inputs = opened.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
    assert len(prompts) == 8
    assert int(inputs["attention_mask"].sum(1).min()) < inputs["input_ids"].shape[1]
    together = opened.model.generate(**inputs, max_new_tokens=20, **GREEDY)
    assert torch.equal(together[:, inputs["input_ids"].shape[1] :], torch.stack(alone))


def test_output_is_the_same_without_a_cache(opened: Opened) -> None:
    expected = new_tokens(opened, PROMPTS, max_new_tokens=12, **GREEDY)
    assert torch.equal(new_tokens(opened, PROMPTS, max_new_tokens=12, use_cache=False, **GREEDY), expected)


def test_prompt_in_chunks_gives_the_same_output(opened: Opened) -> None:
    expected = new_tokens(opened, PROMPTS, max_new_tokens=12, **GREEDY)
    found = new_tokens(opened, PROMPTS, max_new_tokens=12, prefill_chunk_size=5, **GREEDY)
    assert torch.equal(found, expected)


def test_same_seed_same_samples(balanced: Opened) -> None:
    def sampled(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return new_tokens(
            balanced, ["The"], max_new_tokens=30, do_sample=True, num_return_sequences=3, eos_token_id=None
        )

    first = sampled(5)
    assert first.shape == (3, 30)
    assert torch.equal(first, sampled(5))
    assert not torch.equal(first, sampled(6))
    assert not torch.equal(first[0], first[1])


def scored(opened: Opened, prompt: Tensor, new: Tensor) -> float:
    """Return the log-probability of tokens (n,) after a prompt (1, L), computed by this package."""
    tokens = torch.cat((prompt, new[None]), dim=1)
    logits = own_logits(opened, tokens[:, :-1])
    return float(logits[0, prompt.shape[1] - 1 :].log_softmax(-1).gather(1, new[:, None]).sum())


def best_by_beams(opened: Opened, prompt: Tensor, beams: int, n: int) -> tuple[list[int], float]:
    """Return the result of a plain beam search that recomputes everything from the first token."""
    running: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(n):
        rows = torch.tensor([prompt[0].tolist() + row for row, _ in running])
        steps = own_logits(opened, rows)[:, -1].log_softmax(-1)
        total = steps + torch.tensor([score for _, score in running])[:, None]
        values, index = total.flatten().topk(beams)
        running = [
            ([*running[int(i) // total.shape[1]][0], int(i) % total.shape[1]], float(value))
            for value, i in zip(values, index, strict=True)
        ]
    return running[0]


def test_beams_are_those_of_a_search_that_recomputes(opened: Opened) -> None:
    prompt = opened.tokenizer("some words", return_tensors="pt")
    out = opened.model.generate(
        **prompt, max_new_tokens=16, num_beams=4, return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    new = out.sequences[0, prompt["input_ids"].shape[1] :]
    expected, score = best_by_beams(opened, prompt["input_ids"], 4, 16)
    assert new.tolist() == expected
    assert float(out.sequences_scores[0]) * 16 == pytest.approx(score, rel=1e-4)
    assert scored(opened, prompt["input_ids"], new) == pytest.approx(score, rel=1e-4)


def test_beams_of_a_padded_batch_equal_single_searches(balanced: Opened) -> None:
    options = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    alone = [new_tokens(balanced, [prompt], **options) for prompt in PROMPTS]
    assert torch.equal(new_tokens(balanced, PROMPTS, **options), torch.cat(alone))


def test_one_beam_is_greedy_and_more_score_higher(balanced: Opened) -> None:
    prompt = balanced.tokenizer("The", return_tensors="pt")["input_ids"]
    greedy = new_tokens(balanced, ["The"], max_new_tokens=12, num_beams=1, **GREEDY)[0]
    assert greedy.tolist() == own_greedy(balanced, "The", 12)
    beams = new_tokens(balanced, ["The"], max_new_tokens=12, num_beams=8, **GREEDY)[0]
    assert scored(balanced, prompt, beams) >= scored(balanced, prompt, greedy) - 1e-4


def test_streamer_and_stopping_criteria(balanced: Opened) -> None:
    from transformers import StoppingCriteria, TextIteratorStreamer

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    streamer = TextIteratorStreamer(balanced.tokenizer, skip_prompt=True)
    inputs = balanced.tokenizer("The first", return_tensors="pt")
    out = balanced.model.generate(
        **inputs, max_new_tokens=50, streamer=streamer, stopping_criteria=[Stop()], **GREEDY
    )
    assert out.shape[1] == 12
    assert "".join(streamer) == balanced.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    words = [balanced.tokenizer.decode(token) for token in out[0, inputs["input_ids"].shape[1] :]]
    word = next(word for word in words if word.isascii())
    stopped = balanced.model.generate(
        **inputs, max_new_tokens=50, stop_strings=[word], tokenizer=balanced.tokenizer, **GREEDY
    )
    assert stopped.shape[1] <= 12


def test_generate_continues_from_a_state(opened: Opened) -> None:
    """A second turn continues from the state of the first and only processes the new tokens."""
    prompt = opened.tokenizer("The first", return_tensors="pt")["input_ids"]
    whole = opened.model.generate(prompt, max_new_tokens=30, **GREEDY)
    first = opened.model.generate(prompt, max_new_tokens=10, return_dict_in_generate=True, **GREEDY)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    kept = copy.deepcopy(first.past_key_values)
    options = {"max_new_tokens": 20, **GREEDY}
    assert torch.equal(opened.model.generate(first.sequences, past_key_values=kept, **options), whole)
    assert torch.equal(
        opened.model.generate(first.sequences, past_key_values=first.past_key_values, **options), whole
    )


def test_what_a_state_cannot_do_is_refused(balanced: Opened) -> None:
    prompt = balanced.tokenizer("The first", return_tensors="pt")
    with pytest.raises(ValueError, match="stateful"):
        balanced.model.generate(**prompt, max_new_tokens=5, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="pass input_ids"):
        balanced.model.generate(inputs_embeds=torch.zeros(1, 3, 16), max_new_tokens=2, **GREEDY)


def test_pipeline_generates_the_same_text(balanced: Opened) -> None:
    from transformers import pipeline

    write = pipeline("text-generation", model=str(balanced.folder), trust_remote_code=True)
    found = write(PROMPTS, max_new_tokens=15, do_sample=False, batch_size=3, return_full_text=False)
    for prompt, (result,) in zip(PROMPTS, found, strict=True):
        tokens = own_greedy(balanced, prompt, 15)
        assert result["generated_text"] == balanced.own.tokenizer.decode(tokens)
