"""``generate.py --speculate`` and ``tnnlm.load(speculate=...)``: equal text, figures, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tnnlm
from tests.support.converted import write_converted
from tnnlm.errors import UserError
from tnnlm.inference.sampling import SamplingParams
from tnnlm.tokenizer import train_bpe

WORDS = ("--model", "big", "--prompt", "the the the", "--max-new-tokens", "40", "--json")


@pytest.fixture(autouse=True)
def _models(_quiet: None) -> None:
    tokenizer = train_bpe(["the cat sat on the mat"], 300, "<eos>", 1, False)
    for name in ("big", "small"):
        write_converted(Path(name), tokenizer)
    write_converted(Path("foreign"), train_bpe(["sat on"], 300, "<eos>", 1, False))


def generate(script: Any, *words: str) -> dict[str, Any]:
    done = script("generate", *WORDS, *words)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize("proposals", ["ngram", "small"])
def test_greedy_text_is_the_same_and_figures_are_reported(script: Any, proposals: str) -> None:
    expected = generate(script, "--temperature", "0")
    found = generate(script, "--temperature", "0", "--speculate", proposals)
    assert found["text"] == expected["text"]
    assert found["new_tokens"] == expected["new_tokens"] == 40
    assert "tokens_per_pass" not in expected
    assert 1 <= found["tokens_per_pass"] <= 8
    assert 0 <= found["accepted_share"] <= 1


def test_sampled_text_of_a_seed_is_the_same_with_proposals_from_the_text(script: Any) -> None:
    words = ("--temperature", "0.3", "--top-k", "3", "--seed", "1")
    assert generate(script, *words)["text"] == generate(script, *words, "--speculate", "ngram")["text"]


def test_text_of_the_library_is_the_same() -> None:
    greedy = SamplingParams(temperature=0)
    texts = {tnnlm.load("big", speculate=name)("the cat", 20, greedy) for name in (None, "ngram", "small")}
    assert len(texts) == 1


def test_other_tokenizer_is_refused(script: Any) -> None:
    done = script("generate", *WORDS, "--speculate", "foreign")
    assert done.code == 2
    assert done.err.startswith("error: --speculate foreign: its tokenizer is not that of the model; give a ")
    assert done.err.count("\n") == 1


def test_missing_draft_model_is_refused(script: Any) -> None:
    done = script("generate", *WORDS, "--speculate", "nothing")
    assert done.code == 2
    assert done.err.startswith("error: --speculate nothing: ")
    with pytest.raises(UserError, match="--speculate nothing"):
        tnnlm.load("big", speculate="nothing")
    assert script("generate", *WORDS, "--speculate", "").err.startswith("error: --speculate: is empty")
