"""Samples, hints, card and server of a model that was trained on German text have German prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_runs import SETTINGS
from tnnlm.checkpoints.prompts import stored_prompts, usable_prompts
from tnnlm.cli import serve

SENTENCES = (
    "Es war einmal ein M\u00fcller, der hatte drei S\u00f6hne, seine M\u00fchle, einen Esel und einen Kater.",
    "Die S\u00f6hne mussten mahlen, der Esel Getreide holen und Mehl forttragen.",
)


def test_prompts_are_words_of_the_run(script: Any) -> None:
    Path("text.txt").write_text("\n".join(SENTENCES * 250), encoding="utf-8")
    words = [word for word in SETTINGS if not word.startswith("trainer.sample_prompt")]
    trained = script("train", *words, "trainer.max_steps=8", "name=maerchen")
    assert trained.code == 0, trained.err
    (first, *others) = json.loads(Path("runs/maerchen/data.json").read_text())["prompts"]
    text = " ".join(" ".join(SENTENCES * 2).split())
    assert all(prompt in text for prompt in (first, *others))
    assert Path("runs/maerchen/samples.txt").read_text(encoding="utf-8").startswith(f"--- step 8\n{first}")
    assert f"--prompt '{first}'" in trained.out
    done = script("convert", "--no-perplexity", "--no-compile")
    assert f"next: python generate.py --model runs/maerchen/converted --prompt '{first}'" in done.out
    folder = Path("runs/maerchen/converted")
    assert stored_prompts(folder) == (first, *others)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"tokenizer({json.dumps(first, ensure_ascii=False)}, " in card
    assert f"--prompt '{first}'" in card
    pytest.importorskip("fastapi")
    assert serve.load(serve.parse(["--model", "maerchen"]))[4] == (first, *others)


def test_prompts_of_a_file_of_anyone_are_short_lines() -> None:
    assert usable_prompts(["a b", "", "x" * 81, "two\nlines", 7, "\x1b[31m", "\u00e9"]) == ("a b", "\u00e9")
    assert usable_prompts("text") == usable_prompts(None) == ()
    assert len(usable_prompts([str(i) for i in range(99)])) == 8
