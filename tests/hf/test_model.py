"""Converted folders as a ``PreTrainedModel``: logits, masks, losses, states, and unsupported arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.support.hf_folders import CLOSE, Opened, own_logits, some_tokens
from tnnlm.inference.generator import PREFILL_CHUNK


def test_logits_equal_those_of_this_package(opened: Opened) -> None:
    tokens = some_tokens(2, PREFILL_CHUNK)
    out = opened.model(tokens)
    assert torch.equal(out.logits, own_logits(opened, tokens))
    assert out.past_key_values.get_seq_length() == PREFILL_CHUNK
    assert not out.logits.requires_grad


def test_long_input_goes_in_chunks(balanced: Opened) -> None:
    tokens = some_tokens(2, 2 * PREFILL_CHUNK + 70)
    logits = balanced.model(tokens).logits
    torch.testing.assert_close(logits, own_logits(balanced, tokens), **CLOSE)
    last = balanced.model(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(last, logits[:, -1:], **CLOSE)
    chosen = torch.tensor([3, 600, 1000])
    found = balanced.model(tokens, logits_to_keep=chosen).logits
    torch.testing.assert_close(found, logits[:, chosen], **CLOSE)


def test_past_passed_back_gives_the_same_logits(opened: Opened) -> None:
    tokens = some_tokens(2, 40)
    expected = own_logits(opened, tokens)
    past, start = None, 0
    # One token and several, in any order: the length of the input decides, not the presence of a past.
    for length in (1, 7, 1, 1, 20, 10):
        out = opened.model(tokens[:, start : start + length], past_key_values=past)
        torch.testing.assert_close(out.logits, expected[:, start : start + length], **CLOSE)
        past, start = out.past_key_values, start + length
    assert past.get_seq_length() == 40


def test_use_cache_false_leaves_the_past_alone(balanced: Opened) -> None:
    tokens = some_tokens(1, 20)
    past = balanced.model(tokens[:, :10]).past_key_values
    first = balanced.model(tokens[:, 10:], past_key_values=past, use_cache=False)
    assert first.past_key_values is None
    assert past.get_seq_length() == 10
    assert torch.equal(balanced.model(tokens[:, 10:], past_key_values=past).logits, first.logits)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_leaves_the_state_unchanged(opened: Opened, side: str) -> None:
    lengths, width = (1, 5, 12, 8), 12
    mask = torch.zeros(4, width, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(lengths):
        places = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "holes": torch.randperm(width, generator=generator)[:length].sort().values,
        }[side]
        mask[row, places] = 1
    tokens, more = some_tokens(4, width), some_tokens(4, 6)
    out = opened.model(tokens, attention_mask=mask)
    followed = opened.model(more, past_key_values=out.past_key_values)
    for row in range(4):
        alone = tokens[row : row + 1, mask[row].bool()]
        expected = own_logits(opened, torch.cat((alone, more[row : row + 1]), dim=1))[0]
        torch.testing.assert_close(
            out.logits[row, mask[row].bool()], expected[: alone.shape[1]], rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(followed.logits[row], expected[alone.shape[1] :], rtol=1e-3, atol=1e-3)
    # With padding on the right, logits at padded positions are those of the last token.
    if side == "right":
        torch.testing.assert_close(out.logits[1, -1], out.logits[1, 4], rtol=0, atol=0)


def test_a_single_padding_token_is_an_identity(opened: Opened) -> None:
    tokens = some_tokens(2, 9)
    past = opened.model(tokens[:, :4]).past_key_values
    opened.model(tokens[:, 4:5], past_key_values=past, attention_mask=torch.tensor([[1], [0]]))
    logits = opened.model(tokens[:, 5:], past_key_values=past).logits
    torch.testing.assert_close(logits[0], own_logits(opened, tokens[:1])[0, 5:], **CLOSE)
    without = torch.cat((tokens[1:, :4], tokens[1:, 5:]), dim=1)
    torch.testing.assert_close(logits[1], own_logits(opened, without)[0, 4:], **CLOSE)


def test_loss_is_the_mean_over_labels_that_are_not_ignored(balanced: Opened) -> None:
    tokens = some_tokens(3, 20)
    labels = tokens.clone()
    labels[0, :7] = -100
    losses = torch.nn.functional.cross_entropy(
        own_logits(balanced, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    counted = (labels[:, 1:] != -100).flatten()
    out = balanced.model(tokens, labels=labels)
    assert float(out.loss) == pytest.approx(float(losses[counted].mean()), rel=1e-5)
    as_tuple = balanced.model(tokens, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)


def test_copies_and_pickles(balanced: Opened) -> None:
    tokens = some_tokens(1, 12)
    expected = balanced.model(tokens)
    for model in (copy.deepcopy(balanced.model), pickle.loads(pickle.dumps(balanced.model))):
        assert torch.equal(model(tokens).logits, expected.logits)
    past = pickle.loads(pickle.dumps(expected.past_key_values))
    after = balanced.model(tokens, past_key_values=past).logits
    assert torch.equal(after, balanced.model(tokens, past_key_values=expected.past_key_values).logits)


def test_cache_repeats_selects_and_resets_its_rows(opened: Opened) -> None:
    tokens, more = some_tokens(2, 8), some_tokens(6, 5)
    cache = opened.model(tokens).past_key_values
    cache.batch_repeat_interleave(3)
    fork = copy.copy(cache)
    repeated = opened.model(more, past_key_values=cache).logits
    whole = torch.cat((tokens.repeat_interleave(3, 0), more), dim=1)
    torch.testing.assert_close(repeated, own_logits(opened, whole)[:, 8:], **CLOSE)
    order = torch.tensor([5, 0, 0])
    fork.reorder_cache(order)
    assert fork.get_seq_length() == 8
    picked = opened.model(more[:3], past_key_values=fork).logits
    whole = torch.cat((tokens.repeat_interleave(3, 0)[order], more[:3]), dim=1)
    torch.testing.assert_close(picked, own_logits(opened, whole)[:, 8:], **CLOSE)
    with pytest.raises(ValueError, match="has 3 rows, but the input has 6"):
        opened.model(more, past_key_values=fork)
    with pytest.raises(ValueError, match="cropped"):
        fork.crop(1)
    fork.reset()
    assert torch.equal(opened.model(more, past_key_values=fork).logits, opened.model(more).logits)


def test_unsupported_arguments_are_refused(balanced: Opened) -> None:
    tokens = some_tokens(2, 5)
    with pytest.raises(ValueError, match="can't be trained"):
        balanced.model.train()
    assert not balanced.model.training
    assert not balanced.model(tokens, labels=tokens).loss.requires_grad
    with pytest.raises(ValueError, match="pass input_ids"):
        balanced.model(inputs_embeds=torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match="input_ids: is empty"):
        balanced.model(tokens[:, :0])
    with pytest.raises(ValueError, match=r"ids of shape \(B, L\), not float32 of shape \(2, 5\)"):
        balanced.model(tokens.float())
    with pytest.raises(ValueError, match="ids are from 0 to 299"):
        balanced.model(tokens + 290)
    with pytest.raises(ValueError, match="output_hidden_states"):
        balanced.model(tokens, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"attention_mask: .* not \(2, 4\)"):
        balanced.model(tokens, attention_mask=torch.ones(2, 4))
