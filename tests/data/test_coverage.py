"""Characters that a tokenizer loses are counted and reported, and bits per byte of such text are withheld."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.support.training_runs import tiny_run
from tnnlm.config.schema import DataConfig
from tnnlm.coverage import coverage
from tnnlm.data import sampled_coverage
from tnnlm.data.packing import prepare
from tnnlm.tokenizer import TextTokenizer, train_bpe
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.run import train

END = "<eos>"


def letters_of(model: Any, normalizer: Any = None) -> TextTokenizer:
    """Return a tokenizer of single letters."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return TextTokenizer(tokenizer, END)


VOCABULARY = {END: 0, "N": 1, **{letter: i for i, letter in enumerate("ACGT\n ", 2)}}
NAMED = models.WordLevel(VOCABULARY, unk_token="N")
DROPPING = models.BPE(VOCABULARY, [])
UNIGRAM = models.Unigram([(END, 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in "ACGT\n ")], 1, False)


@pytest.mark.parametrize(
    ("tokenizer", "text", "lost"),
    [
        (letters_of(NAMED), "ACGT N\nGA", (0, 0)),
        (letters_of(NAMED), "AxC yG", (2, 0)),
        (letters_of(DROPPING), "AxxC G", (2, 0)),
        (letters_of(UNIGRAM), "AxC G", (1, 0)),
        (letters_of(NAMED, normalizers.Replace("C", "A")), "CACA", (0, 2)),
        (letters_of(NAMED, normalizers.Replace("C", "")), "CACA", (2, 0)),
        (letters_of(NAMED, normalizers.Replace("\n", " ")), "C\nA", (0, 1)),
        (train_bpe(["ACGT"], 257, END, 1, progress=False), " na\u00efve \U0001f600\r\n\te\u0301 ", (0, 0)),
    ],
    ids=["known", "unknown", "dropped", "unigram", "changed", "removed", "line-ends", "bytes"],
)
def test_lost_characters_are_counted(tokenizer: TextTokenizer, text: str, lost: tuple[int, int]) -> None:
    assert coverage(tokenizer, [text])[1:] == lost
    assert coverage(tokenizer, [text, text])[1:] == (2 * lost[0], 2 * lost[1])
    assert coverage(tokenizer, []) == (0, 0, 0)


def test_unknown_words_take_a_blank_with_them() -> None:
    tokenizer = Tokenizer(models.WordLevel({END: 0, "<unk>": 1, "cat": 2, "mat": 3}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert coverage(TextTokenizer(tokenizer, END), ["cat dog <unk> mat"]) == (17, 3, 0)


def write_text(unknown: str) -> DataConfig:
    """Return the settings of 6,000 letters and ``unknown``, with a tokenizer of the letters."""
    Path("dna.txt").write_text("ACGT" * 1_500 + unknown)
    Path("dna.json").write_text(letters_of(NAMED).to_json())
    return DataConfig(source="files", files=["dna.txt"], tokenizer="dna.json", eos_token=END)


@pytest.mark.parametrize(("unknown", "lossy"), [("", False), ("x", False), ("x" * 70, True)])
def test_the_report_counts_what_the_tokenizer_loses(unknown: str, lossy: bool) -> None:
    report = prepare(write_text(unknown), 16, 0).report
    lines = " ".join(report.lines())
    assert (report.checked, report.unknown, report.changed) == (6_000 + len(unknown), len(unknown), 0)
    assert report.lossy is lossy
    assert (f"{len(unknown)} are unknown to the tokenizer" in lines) is bool(unknown)
    assert ("val/bpb is not reported" in lines) is lossy


def test_the_sample_is_bounded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_coverage, "SAMPLE", 10)
    monkeypatch.setattr(sampled_coverage, "DOCUMENTS", 3)
    documents = ["A" * 9, "C" * 9, "G", "x" * 9, "T" * 9, "A" * 9]
    assert list(sampled_coverage._sample(documents)) == ["AAA", "G", "TTTTTT"]
    assert list(sampled_coverage._sample([])) == []


def test_bits_per_byte_are_withheld_if_the_tokenizer_loses_text(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run("trainer.max_steps=1", "trainer.sample_tokens=0")
    data = write_text("x" * 600)
    config.data.files, config.data.tokenizer, config.data.eos_token = data.files, data.tokenizer, END
    config.data.source = "files"
    config.model.max_length = 32
    train(config)
    summary = json.loads(Path("runs/demo/summary.json").read_text())
    assert summary["data"]["unknown"] == 600
    assert summary["val/ppl"] > 1
    assert "val/bpb" not in summary
    assert not any(row["val/bpb"] for row in read_metrics(Path("runs/demo/metrics.csv")))
    assert Path("runs/demo/loss.png").is_file()
    assert "600 are unknown to the tokenizer" in capsys.readouterr().out
