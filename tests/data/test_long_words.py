"""Unbroken words of any length: training a tokenizer and packing stay linear, and report their progress."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tnnlm import tokenizer as tokenizers
from tnnlm.config.schema import DataConfig
from tnnlm.data import packing, progress
from tnnlm.data.packing import prepare
from tnnlm.data.token_files import Layout
from tnnlm.data.tokenize_split import tokenize_split
from tnnlm.tokenizer import LONGEST_WORD, TextTokenizer, train_bpe

EOS = "<|endoftext|>"
ALPHABETS = {
    "letters": "abcdefghijklmnopqrstuvwxyz",
    "DNA": "ACGT",
    "spaces": " \t",
    "ideographs": "中文字符",
}


def word(length: int, letters: str = ALPHABETS["letters"]) -> str:
    return "".join(random.Random(0).choices(letters, k=length))


def seconds(work: Callable[[], Any]) -> float:
    """Return the shortest processor time of three calls."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def trained(text: str) -> TextTokenizer:
    return train_bpe([text], 300, EOS, 1, False)


@pytest.mark.parametrize("letters", ALPHABETS.values(), ids=ALPHABETS)
def test_training_sees_no_long_word_and_loses_nothing(letters: str) -> None:
    text = "short words " + word(5 * LONGEST_WORD + 7, letters) + " and more"
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers._PARTS]
    ).pre_tokenize_str(text)
    parts = [part for part, _ in words]
    assert max(map(len, parts)) == LONGEST_WORD
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert "".join(parts) == "".join(part for part, _ in whole)


def test_words_of_ordinary_length_train_the_same_tokenizer_as_without_the_limit() -> None:
    text = " ".join(word(n) for n in range(1, LONGEST_WORD, 7))
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    assert train_bpe([text], 400, EOS, 1, False).tokenizer.get_vocab() == plain.get_vocab()


@pytest.mark.parametrize("letters", ["letters", "DNA"])
def test_training_takes_linear_time(letters: str) -> None:
    short, long = (word(length, ALPHABETS[letters]) for length in (20_000, 160_000))
    # Eight times the text; quadratic work would take 64 times as long.
    assert seconds(lambda: trained(long)) < 24 * seconds(lambda: trained(short))


@pytest.mark.parametrize("letters", ["letters", "spaces"])
def test_packing_takes_linear_time(letters: str) -> None:
    tokenizer = trained("some words of another text " * 20)
    layout = Layout.of(tokenizer.size)
    short, long = (word(length, ALPHABETS[letters]) for length in (40_000, 320_000))
    times = [
        seconds(lambda text=text, n=n: tokenize_split([text], tokenizer, fresh(), "pack", layout))  # type: ignore[misc]
        for n, text in enumerate((short, long))
    ]
    assert times[1] < 24 * times[0]


def fresh(count: Any = itertools.count()) -> Path:  # noqa: B008  counts over all calls
    folder = Path(f"packed{next(count)}")
    folder.mkdir()
    return folder


def test_long_word_is_encoded_as_a_whole() -> None:
    text = word(5_000, "ab")
    tokenizer = train_bpe([text], 280, EOS, 1, False)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    again = TextTokenizer.from_json(tokenizer.to_json(), EOS)
    assert again.encode(text) == tokenizer.encode(text)
    assert [piece for piece, _ in again.tokenizer.pre_tokenizer.pre_tokenize_str(text)] == [text]
    Path("dna.txt").write_text(text + "\n" + text)
    corpus = prepare(DataConfig(source="files", files=["dna.txt"], val_fraction=0.4), 280, 0)
    stream = corpus.rows("train", 1).tokens[:].tolist()
    assert corpus.tokenizer.decode(stream) == text + "\n"


def test_progress_is_lines_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    for _ in progress.progress(range(5), desc="read rows", unit="row"):
        time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("read rows: ") and "row" in line for line in lines)
    assert any("/5" in line for line in lines)


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.progress(range(5), desc="read rows")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_training_a_tokenizer_reports_what_was_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text("some words\n" * 900)
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    train = packing.train_bpe

    def slow(texts: Any, *args: Any) -> TextTokenizer:
        made = train(texts, *args)
        time.sleep(0.1)  # as in merging a large text
        return made

    monkeypatch.setattr(packing, "train_bpe", slow)
    prepare(DataConfig(source="files", files=["a.txt"], val_fraction=0.1), 280, 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train tokenizer: ")]
    assert lines[-1].startswith("train tokenizer: 8,910 characters read, merging, ")
