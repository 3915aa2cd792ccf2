"""Embeddings that have more or fewer rows than the tokenizer has ids, and their resizing, as with a Llama."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.hf_folders import Opened, open_folder, own_logits, tiny_llama
from tnnlm.checkpoints.converted import load_converted
from tnnlm.inference.generator import TextGenerator

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
PROMPT = torch.tensor([[267, 221, 272, 40, 17]])


def test_ids_that_the_tokenizer_lacks_have_no_probability(opened: Opened) -> None:
    """Perplexities and the scores of the harness come from these logits, and equal those of the server."""
    size = opened.own.tokenizer.size
    assert opened.model.config.missing_ids == list(range(size, 300))
    logits = opened.model(PROMPT).logits
    assert bool((logits[..., size:] == -math.inf).all())
    found = logits[:, :-1].log_softmax(-1).gather(2, PROMPT[:, 1:, None])
    served = own_logits(opened, PROMPT)[:, :-1, :size].log_softmax(-1).gather(2, PROMPT[:, 1:, None])
    torch.testing.assert_close(found, served, rtol=1e-5, atol=1e-5)
    loss = opened.model(PROMPT, labels=PROMPT).loss
    torch.testing.assert_close(loss, -served.mean(), rtol=1e-5, atol=1e-5)
    one = opened.model(PROMPT[:, :1]).logits
    assert bool((one[..., size:] == -math.inf).all())


def generated(model: Any, **options: Any) -> Tensor:
    return model.generate(PROMPT, **GREEDY | options)


@pytest.mark.parametrize("rows", [280, 294, 310])
def test_resized_models_generate_and_load_as_a_llama_does(
    balanced: Opened, tmp_path: Path, rows: int
) -> None:
    from transformers import AutoModelForCausalLM

    for name, model in (("llama", tiny_llama()), ("tnnlm", copy.deepcopy(balanced.model))):
        before, shared = model(PROMPT).logits, min(rows, balanced.own.tokenizer.size)
        torch.manual_seed(0)
        model.resize_token_embeddings(rows)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == rows
        logits = model(PROMPT).logits
        assert logits.shape == (1, PROMPT.shape[1], rows)
        assert bool(logits.isfinite().all())
        torch.testing.assert_close(logits[..., :shared], before[..., :shared])
        expected = generated(model)
        assert int(expected.max()) < rows
        assert torch.equal(generated(model, use_cache=False), expected)
        assert torch.equal(generated(model, num_beams=2, use_cache=False), generated(model, num_beams=2))
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert torch.equal(again(PROMPT).logits, logits)
        assert torch.equal(generated(again), expected)
        with pytest.raises((IndexError, ValueError), match="out of range"):
            model(torch.tensor([[rows]]))


def test_rows_that_pad_the_embedding_stay_masked(balanced: Opened, tmp_path: Path) -> None:
    """``len(tokenizer)`` rows, rounded up to a multiple, is how Transformers' guides resize an embedding."""
    model, size = copy.deepcopy(balanced.model), balanced.own.tokenizer.size
    model.generation_config.suppress_tokens = [3, *model.generation_config.suppress_tokens]
    expected = generated(model)
    assert 3 not in expected[0, PROMPT.shape[1] :]
    model.resize_token_embeddings(len(balanced.tokenizer), pad_to_multiple_of=64)
    assert model.get_input_embeddings().num_embeddings == 320
    assert model.config.missing_ids == list(range(size, 320))
    assert model.generation_config.suppress_tokens == [3, *range(size, 320)]
    assert torch.equal(generated(model), expected)
    model.resize_token_embeddings(pad_to_multiple_of=50)
    assert model.config.missing_ids == list(range(size, 350))
    assert torch.equal(generated(model), expected)


def test_added_tokens_can_be_generated(balanced: Opened) -> None:
    model, size = copy.deepcopy(balanced.model), balanced.own.tokenizer.size
    model.resize_token_embeddings(size + 2)
    assert model.config.missing_ids == []
    assert model.generation_config.suppress_tokens is None
    with torch.no_grad():
        model.get_input_embeddings().weight[size] = 100 * model.get_input_embeddings().weight[40]
        model.get_input_embeddings().weight[size + 1] = -model.get_input_embeddings().weight[size]
    assert int(generated(model).max()) >= size


def test_gaps_of_the_tokenizer_stay_masked(balanced: Opened) -> None:
    """A tokenizer may lack ids below its highest one, where tokens were removed from it."""
    model, (gap, *_) = copy.deepcopy(balanced.model), generated(balanced.model)[0, PROMPT.shape[1] :].tolist()
    model.config.missing_ids = [gap, *model.config.missing_ids]
    assert gap not in generated(model)[0, PROMPT.shape[1] :]
    model.resize_token_embeddings(300)
    assert model.config.missing_ids == [gap, *range(balanced.own.tokenizer.size, 300)]
    model.resize_token_embeddings(310)
    assert model.config.missing_ids == [gap]
    assert float(model(PROMPT).logits[0, -1, gap]) == -math.inf


def test_a_padded_folder_loads_in_this_package(balanced: Opened, tmp_path: Path) -> None:
    model = copy.deepcopy(balanced.model)
    model.resize_token_embeddings(len(balanced.tokenizer), pad_to_multiple_of=64)
    model.save_pretrained(tmp_path)
    balanced.tokenizer.save_pretrained(tmp_path)
    loaded = load_converted(tmp_path)
    assert loaded.model.config.vocab_size == 320
    again = open_folder(tmp_path)
    assert torch.equal(again.model(PROMPT).logits, own_logits(again, PROMPT))
    own = TextGenerator(loaded.model, loaded.tokenizer)
    assert own.prefill(["The"]).logits.shape[-1] == 320
