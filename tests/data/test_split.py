"""Split of documents into training and validation data."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.text_files import LINES, documents, jsonl, read, write
from tnnlm.data.sources import FEW_DOCUMENTS


def test_split_follows_from_the_seed() -> None:
    write("a.jsonl", jsonl(documents(60)))
    assert read("a.jsonl", seed=1, val_fraction=0.2) == read("a.jsonl", seed=1, val_fraction=0.2)
    assert read("a.jsonl", seed=1, val_fraction=0.2) != read("a.jsonl", seed=2, val_fraction=0.2)


def test_split_does_not_depend_on_the_order_of_documents() -> None:
    texts = documents(60)
    _, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.2)
    _, reversed_val = read(write("b.jsonl", jsonl(texts[::-1])), val_fraction=0.2)
    assert sorted(val) == sorted(reversed_val)


@pytest.mark.parametrize("n", [FEW_DOCUMENTS, 300])
def test_split_is_by_document_and_loses_none(n: int) -> None:
    texts = documents(n)
    train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.2)
    assert val
    assert not set(train) & set(val)
    assert Counter(train + val) == Counter(texts)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_split_holds_out_the_fraction(fraction: float) -> None:
    texts = documents(400)
    _, val = read(write("a.jsonl", jsonl(texts)), val_fraction=fraction)
    longest = max(map(len, texts))
    excess = sum(map(len, val)) - fraction * sum(map(len, texts))
    assert 0 <= excess <= longest


def test_split_does_not_hold_out_a_document_that_is_most_of_the_text() -> None:
    texts = [*documents(30), "a huge document\n" * 5_000]
    for seed in range(5):
        train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.1, seed=seed)
        assert texts[-1] in train
        assert val


def test_split_keeps_equal_documents_together() -> None:
    # Licences and templates are repeated in many documents; a copy in the training split would spoil the
    # validation.
    texts = [text for text in documents(20) for _ in range(5)]
    train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.07)
    assert not set(train) & set(val)


@pytest.mark.parametrize("n", [1, 3, FEW_DOCUMENTS - 1])
def test_split_cuts_few_documents_in_two_and_loses_nothing(n: int) -> None:
    texts = [LINES.replace("line", f"line {i} {'x' * i}") for i in range(n)]
    train, val = read(write("a.jsonl", jsonl(texts)), val_fraction=0.25)
    assert [a + b for a, b in zip(train, val, strict=True)] == texts
    assert sum(map(len, val)) == pytest.approx(0.25 * sum(map(len, texts)), rel=0.2)
    # The cut is at a line break if there is one nearby.
    assert all(text.endswith("\n") for text in train)


def test_split_cuts_a_text_of_one_line() -> None:
    text = "word " * 100
    train, val = read(write("a.txt", text), val_fraction=0.1)
    assert (len(train[0]), train[0] + val[0]) == (450, text)
