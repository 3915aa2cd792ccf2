"""Benchmark mode speculate on a tiny model: figures and table."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.speculation import measure_speculation, show_speculation, source_tokens
from benchmarks.subjects import SHAPE
from tests.support.converted import write_converted
from tnnlm.inference.load import load
from tnnlm.tokenizer import train_bpe


def test_three_kinds_are_measured() -> None:
    write_converted(Path("tiny"), train_bpe(["the cat sat on the mat"], 300, "<eos>", 1, False))
    args = argparse.Namespace(
        model="tiny",
        dtype="float32",
        engine="packed",
        quick=True,
        trust_code=False,
        speculate="ngram",
        contexts=[64],
    )
    result = measure_speculation(args, SHAPE)
    rows = {row["name"]: row for row in result["results"]}
    assert [row["context"] for row in result["results"]] == [64] * 3
    assert [row["tokens"] for row in rows.values()] == [3 * 192] * 3
    assert rows["replayed sources"]["tokens_per_pass"] > rows["replayed in random order"]["tokens_per_pass"]
    assert all(row["ratio"] > 0 and 0 <= row["accepted_share"] <= 1 for row in rows.values())
    shown = show_speculation(result)
    assert all(name in shown for name in rows)
    assert shown.startswith("packed engine")


def test_sources_are_long_and_always_the_same() -> None:
    write_converted(Path("tiny"), train_bpe(["the cat sat on the mat"], 300, "<eos>", 1, False))
    sources = source_tokens(load("tiny", engine="packed"), 3, 700)
    assert [len(tokens) for tokens in sources] == [700] * 3
    assert len({tuple(tokens) for tokens in sources}) == 3
    assert sources == source_tokens(load("tiny", engine="packed"), 3, 700)
