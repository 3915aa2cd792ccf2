"""Caches in ``generate()``, compared with a Llama: the same text as without a cache, or one clear line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from tests.support.hf_folders import Opened, tiny_llama

N = 10
GREEDY = {"max_new_tokens": N, "do_sample": False, "eos_token_id": None}
PROMPT = torch.tensor([[267, 221, 272, 281, 262, 40, 17]])
MORE = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


def read(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Any:
    """Return the cache after some tokens."""
    # A Llama numbers positions with padding otherwise; a recurrence has no positions and ignores them.
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions).past_key_values


def new(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Return the greedy tokens (B, N) after a prompt."""
    return model.generate(tokens, **GREEDY | options)[:, tokens.shape[1] :]


def outcome(case: Callable[[Any], Tensor], model: Any) -> Tensor | Exception:
    try:
        return case(model)
    except Exception as error:
        return error


def forked(model: Any, fork: Callable[[Any], Any]) -> Tensor:
    return new(model, PROMPT, past_key_values=fork(read(model, PROMPT[:, :-2])))


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=64)


CACHES: dict[str, Callable[[Any], Tensor]] = {
    "a part of the prompt": lambda m: new(m, PROMPT, past_key_values=read(m, PROMPT[:, :3])),
    "all but the last token": lambda m: new(m, PROMPT, past_key_values=read(m, PROMPT[:, :-1])),
    "whole prompt": lambda m: new(m, PROMPT, past_key_values=read(m, PROMPT)),
    "whole prompt and mask": lambda m: new(
        m, PROMPT, past_key_values=read(m, PROMPT), attention_mask=torch.ones_like(PROMPT)
    ),
    "whole prompt in chunks": lambda m: new(m, PROMPT, past_key_values=read(m, PROMPT), prefill_chunk_size=2),
    "a part in chunks": lambda m: new(
        m, PROMPT, past_key_values=read(m, PROMPT[:, :3]), prefill_chunk_size=2
    ),
    "new tokens and the mask of all": lambda m: new(
        m, PROMPT[:, 4:], past_key_values=read(m, PROMPT[:, :4]), attention_mask=torch.ones_like(PROMPT)
    ),
    "empty DynamicCache": lambda m: new(m, PROMPT, past_key_values=DynamicCache()),
    "DynamicCache with config": lambda m: new(m, PROMPT, past_key_values=DynamicCache(config=m.config)),
    "empty StaticCache": lambda m: new(m, PROMPT, past_key_values=static(m)),
    "static cache": lambda m: new(m, PROMPT, cache_implementation="static"),
    "no cache": lambda m: new(m, PROMPT, use_cache=False),
    "pickled": lambda m: forked(m, lambda cache: pickle.loads(pickle.dumps(cache))),
}
"""Ways to pass a cache, for which ``generate()`` must return what it returns without one."""


@pytest.mark.parametrize("case", CACHES)
def test_a_cache_does_not_change_the_text(opened: Opened, llama: Any, case: str) -> None:
    assert torch.equal(CACHES[case](opened.model), new(opened.model, PROMPT))
    # Transformers processes a prompt twice that is wholly in the cache (huggingface/transformers#36151).
    if not case.startswith("whole"):
        assert torch.equal(CACHES[case](llama), new(llama, PROMPT))


@pytest.mark.parametrize("fork", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_cache_is_a_fork(balanced: Opened, fork: Callable[[Any], Any]) -> None:
    cache = read(balanced.model, PROMPT)
    kept = fork(cache)
    expected = new(balanced.model, PROMPT)
    assert torch.equal(new(balanced.model, PROMPT, past_key_values=cache), expected)
    assert (kept.get_seq_length(), cache.get_seq_length()) == (PROMPT.shape[1], PROMPT.shape[1] + N - 1)
    assert torch.equal(new(balanced.model, PROMPT, past_key_values=kept), expected)


REFUSED: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "prompt shorter than its cache": (
        lambda m: new(m, PROMPT[:, :3], past_key_values=read(m, PROMPT)),
        "input_ids: has 3 tokens, but past_key_values has already processed 7; pass the whole text",
    ),
    "much shorter": (
        lambda m: new(m, PROMPT[:, :2], past_key_values=read(m, PROMPT)),
        "input_ids: has 2 tokens, but past_key_values has already processed 7",
    ),
    "new tokens without the mask of all": (
        lambda m: new(m, MORE, past_key_values=read(m, PROMPT)),
        "or new tokens with the attention_mask of the whole text",
    ),
    "new tokens on an empty cache": (
        lambda m: new(m, MORE, past_key_values=DynamicCache(), attention_mask=torch.ones(1, 10)),
        "attention_mask: covers 10 tokens, but past_key_values holds 0 and input_ids 3",
    ),
    "cache and use_cache=False": (
        lambda m: new(m, PROMPT, past_key_values=read(m, PROMPT[:, :3]), use_cache=False),
        "use_cache=False: can't be combined with past_key_values",
    ),
    "rows of another batch": (
        lambda m: new(m, PROMPT.expand(3, -1), past_key_values=read(m, PROMPT[:, :3])),
        "past_key_values: has 1 rows, but the input has 3",
    ),
    "beams without repeated rows": (
        lambda m: new(m, PROMPT, past_key_values=read(m, PROMPT[:, :3]), num_beams=3),
        "repeat its rows with batch_repeat_interleave",
    ),
    "encoder and decoder": (
        lambda m: new(m, PROMPT, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())),
        "past_key_values: has type EncoderDecoderCache, which can't hold a recurrent state",
    ),
    "tuple": (lambda m: new(m, PROMPT, past_key_values=()), "tuple of `past_key_values` is not supported"),
    "positive crop": (lambda m: read(m, PROMPT).crop(3), "can't be cropped"),
    "no token": (lambda m: new(m, PROMPT[:, :0]), "input_ids: is empty"),
    "inputs_embeds and no ids": (lambda m: m(inputs_embeds=None), "input_ids"),
}
"""Calls that Llama refuses too, or answers with another text in silence, and the message for each."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_fits_no_text_is_refused_in_one_line(balanced: Opened, llama: Any, case: str) -> None:
    run, message = REFUSED[case]
    reference = outcome(run, llama)
    assert isinstance(reference, Exception) or not torch.equal(reference, new(llama, PROMPT))
    error = outcome(run, balanced.model)
    assert isinstance(error, ValueError)
    assert message in str(error)
    assert "\n" not in str(error)


def test_the_cache_of_another_model_is_refused_by_both(balanced: Opened, opened: Opened, llama: Any) -> None:
    with pytest.raises(ValueError, match="past_key_values: is the DynamicCache of another model; omit it"):
        new(balanced.model, PROMPT, past_key_values=read(llama, PROMPT[:, :3]))
    with pytest.raises(ValueError, match="holds the state of a recurrent model, not keys and values"):
        new(llama, PROMPT, past_key_values=read(balanced.model, PROMPT[:, :3]))
    other = read(opened.model, PROMPT[:, :3])
    same = [part.shape for part in other.state.tensors] == [
        part.shape for part in read(balanced.model, PROMPT).state.tensors
    ]
    if not same:
        with pytest.raises(ValueError, match="holds the state of another model"):
            new(balanced.model, PROMPT, past_key_values=other)


def test_one_cache_for_several_turns(opened: Opened, llama: Any) -> None:
    """A chat passes the whole text so far, with the cache that was returned or with one object for all."""
    for model in (llama, opened.model):
        text, returned, own = PROMPT, None, DynamicCache()
        for _ in range(3):
            expected = model.generate(text, **GREEDY)
            out = model.generate(text, past_key_values=returned, return_dict_in_generate=True, **GREEDY)
            assert torch.equal(out.sequences, expected)
            assert torch.equal(model.generate(text, past_key_values=own, **GREEDY), expected)
            returned = out.past_key_values
            # The last token was generated, but not processed.
            assert returned.get_seq_length() == own.get_seq_length() == expected.shape[1] - 1
            text = torch.cat((expected, MORE), dim=1)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return three prompts of different lengths (3, 7) with their mask."""
    tokens, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate((2, 7, 4)):
        place = slice(7 - length, 7) if side == "left" else slice(length)
        tokens[row, place], mask[row, place] = PROMPT[0, :length], 1
    return tokens, mask


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_with_any_cache_equal_single_prompts(
    opened: Opened, llama: Any, side: str, chunk: int | None
) -> None:
    tokens, mask = padded(side)
    for model in (opened.model, *([llama] if side == "left" else [])):
        alone = torch.cat([new(model, PROMPT[:, :length]) for length in (2, 7, 4)])
        options = {"attention_mask": mask, "prefill_chunk_size": chunk}
        assert torch.equal(new(model, tokens, **options), alone)
        assert torch.equal(new(model, tokens, past_key_values=DynamicCache(), **options), alone)
        partial = read(model, tokens[:, :5], mask[:, :5])
        assert torch.equal(new(model, tokens, past_key_values=partial, **options), alone)
        if model is opened.model:
            assert torch.equal(new(model, tokens, attention_mask=mask, use_cache=False), alone)
            whole = read(model, tokens, mask)
            assert torch.equal(new(model, tokens, past_key_values=whole, **options), alone)


def test_beams_reorder_any_cache(balanced: Opened, llama: Any) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 3}
    for model in (llama, balanced.model):
        expected = new(model, PROMPT, **beams)
        assert torch.equal(new(model, PROMPT, past_key_values=DynamicCache(), **beams), expected)
        cache = read(model, PROMPT[:, :4])
        cache.batch_repeat_interleave(3)
        assert torch.equal(new(model, PROMPT, past_key_values=cache, **beams), expected)
    whole = read(balanced.model, PROMPT)
    whole.batch_repeat_interleave(3)
    assert torch.equal(new(balanced.model, PROMPT, past_key_values=whole, **beams), expected)


def test_cropping_nothing_is_allowed_and_tokens_are_kept(balanced: Opened, llama: Any) -> None:
    for model in (llama, balanced.model):
        cache = read(model, PROMPT)
        cache.crop(0)
        assert cache.get_seq_length() == PROMPT.shape[1]
    with pytest.raises(ValueError, match="can't be cropped; copy the cache before"):
        cache.crop(-1)
    assert not cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == -1


def test_scores_and_logits_are_those_without_a_cache(balanced: Opened, llama: Any) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **GREEDY}
    for model in (llama, balanced.model):
        plain = model.generate(PROMPT, use_cache=False, **options)
        cached = model.generate(PROMPT, past_key_values=read(model, PROMPT[:, :3]), **options)
        for name in ("scores", "logits"):
            expected, found = (torch.stack(out[name]) for out in (plain, cached))
            assert expected.shape == (N, 1, 300)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_guidance_is_the_same_with_and_without_a_cache(balanced: Opened, llama: Any) -> None:
    for model in (llama, balanced.model):
        expected = new(model, PROMPT, guidance_scale=1.5, use_cache=False)
        assert torch.equal(new(model, PROMPT, guidance_scale=1.5), expected)
        assert not torch.equal(new(model, PROMPT), expected)


def test_continuous_batching_is_refused_in_one_line(balanced: Opened) -> None:
    with pytest.raises(ValueError, match="is not supported by a recurrent model; omit it") as caught:
        new(balanced.model, PROMPT, cache_implementation="paged")
    assert "\n" not in str(caught.value)


def test_no_new_token_gives_the_logits_of_the_last_one(opened: Opened) -> None:
    tokens, mask = padded("right")
    out = opened.model(tokens, attention_mask=mask)
    again = opened.model(tokens[:, :0], past_key_values=out.past_key_values, use_cache=False).logits
    assert again.shape == (3, 1, 300)
    torch.testing.assert_close(again, out.logits[:, -1:], rtol=1e-4, atol=1e-4)
    # One padding token changes nothing either.
    one = opened.model(tokens[:, :1], attention_mask=torch.zeros(3, 1), past_key_values=out.past_key_values)
    assert torch.equal(one.logits, again)


def test_a_compiled_forward_takes_the_same_caches(balanced: Opened) -> None:
    compiled = torch.compile(balanced.model, backend="eager")
    expected = balanced.model(PROMPT).logits
    torch.testing.assert_close(compiled(PROMPT).logits, expected, rtol=1e-3, atol=1e-3)
    cache = DynamicCache()
    compiled(PROMPT[:, :4], past_key_values=cache)
    assert cache.get_seq_length() == 4
    rest = compiled(PROMPT[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 4:], rtol=1e-3, atol=1e-3)


def test_search_that_needs_more_than_a_state_is_refused(balanced: Opened, llama: Any) -> None:
    for model in (llama, balanced.model):
        with pytest.raises(ValueError, match="trust_remote_code") as caught:
            new(model, PROMPT, penalty_alpha=0.6, top_k=4)
        assert "\n" not in str(caught.value)
    # Candidates of an assistant that are rejected must be removed from the cache.
    with pytest.raises(ValueError, match="stateful models, such as TnnlmForCausalLM"):
        new(balanced.model, PROMPT, assistant_model=llama)
    with pytest.raises(ValueError, match="a recurrent state can't be cropped"):
        new(llama, PROMPT, assistant_model=balanced.model)
