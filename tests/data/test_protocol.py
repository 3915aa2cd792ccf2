"""The text protocol of fairseq: an end token per line, every token scored once, and perplexity per word."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from tests.support.models import tiny_config
from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.training import load_checkpoint
from tnnlm.config.loader import load_config
from tnnlm.config.schema import DataConfig
from tnnlm.conversion import convert_model
from tnnlm.data.packing import PackedCorpus, PackedRows, prepare
from tnnlm.data.text import lines_of, words_in
from tnnlm.errors import ConfigError, DataError
from tnnlm.evaluation import add, parallel_nll, recurrent_nll
from tnnlm.models.batches import PADDING
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import TextTokenizer, train_bpe
from tnnlm.training.run import train

EOS = "<|endoftext|>"
LINES = [
    " = A heading = \n",
    "\n",
    "The first words , and more words .\n",
    "\n",
    "\n",
    "  The last\twords \n",
]
"""Rows as those of WikiText-103: each is a line, some of them blank."""


def tokenizer_file() -> str:
    Path("given.json").write_text(train_bpe(LINES, 280, EOS, len(LINES), progress=False).to_json())
    return "given.json"


def expected_stream(tokenizer: TextTokenizer, lines: list[str]) -> list[int]:
    stream = [tokenizer.eos_id]
    for line in lines:
        stream += [*tokenizer.encode(line.strip()), tokenizer.eos_id]
    return stream


def stream_of(corpus: PackedCorpus, split: str) -> list[int]:
    return list(corpus.rows(split, 1).tokens[:].tolist())


def hub_corpus(**changes: Any) -> PackedCorpus:
    for split, rows in (("train", LINES * 3), ("validation", LINES)):
        Path("corpus").mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"text": rows}).to_parquet(f"corpus/{split}.parquet")
    settings = {"hub_val_split": "validation", "protocol": "fairseq", "tokenizer": tokenizer_file()}
    return prepare(DataConfig(source="hub", hub_name="corpus", **{**settings, **changes}), 300, 0)


@pytest.mark.parametrize("options", [{}, {"streaming": True, "max_documents": 99}])
def test_rows_of_a_hub_data_set_are_lines_with_an_end_token_each(options: dict[str, Any]) -> None:
    corpus = hub_corpus(**options)
    for split, rows in (("train", LINES * 3), ("val", LINES)):
        assert stream_of(corpus, split) == expected_stream(corpus.tokenizer, rows)
    assert corpus.val.words == len(" ".join(LINES).split()) + len(LINES)
    assert corpus.val.bytes == len("\n".join(line.strip() for line in LINES)) + 1
    # Blank lines are neither duplicates nor copies of training text.
    assert (corpus.report.duplicates, corpus.report.shared) == (9, 3)
    assert corpus.report.protocol == "fairseq"
    assert any("protocol fairseq" in line for line in corpus.report.lines())


def test_lines_of_files_are_those_of_rows() -> None:
    Path("text.txt").write_text("".join(LINES) * 20)
    config = DataConfig(
        source="files", files=["text.txt"], protocol="fairseq", val_fraction=0.2, tokenizer=tokenizer_file()
    )
    corpus = prepare(config, 300, 0)
    found = stream_of(corpus, "train")[:-1] + stream_of(corpus, "val")
    assert found.count(corpus.tokenizer.eos_id) >= 20 * len(LINES)
    assert corpus.tokenizer.decode(found) == "".join(line.strip() for line in LINES) * 20
    documents = prepare(DataConfig(**{**vars(config), "protocol": "documents"}), 300, 0)
    assert documents.folder != corpus.folder
    assert documents.report.change(corpus.report) is not None
    assert documents.val.words == corpus.val.words


def test_empty_rows_of_files_are_blank_lines_as_those_of_the_hub() -> None:
    for name, rows in (("train.jsonl", LINES * 3), ("val.jsonl", ["", *LINES])):
        Path(name).write_text("".join(json.dumps({"text": row}) + "\n" for row in ["", *rows]))
    config = DataConfig(source="files", files=["train.jsonl"], protocol="fairseq", validation=["val.jsonl"])
    report = prepare(replace(config, tokenizer=tokenizer_file()), 300, 0).report
    assert (report.duplicates, report.shared) == (9, 3)
    Path("train.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="contains no text"):
        prepare(replace(config, tokenizer=tokenizer_file(), validation=[]), 300, 0)


def test_words_and_lines() -> None:
    text = "One two\n\n  three \nend"
    assert lines_of(text) == ["One two", "", "three", "end"]
    assert lines_of("a\n") == ["a"]
    assert lines_of("") == lines_of("\n") == [""]
    # Line ends are words, as in the 217,646 words of WikiText-103's validation split.
    assert words_in(text, ends=True) == 4 + 4
    assert words_in("a b\n", ends=True) == 3
    assert words_in("a b", ends=False) == 2
    spaces = [chr(code) for code in range(0x3001) if chr(code).isspace()]
    for text in ("", " ", "ab", *(f"{a}é{b}漢{a}x" for a in spaces for b in ("", *spaces))):
        assert words_in(text, ends=False) == len(text.split()) + text.count("\n")


@pytest.mark.parametrize("n_tokens", [1, 2, 9, 10, 12])
def test_every_token_is_a_target_once(n_tokens: int) -> None:
    rows = PackedRows(np.arange(n_tokens, dtype=np.int32), 4, complete=True)
    rows = pickle.loads(pickle.dumps(rows))
    targets = [int(token) for row in rows for token in row[1:] if token != PADDING]
    assert targets == list(range(1, n_tokens))
    assert all(len(row) == 5 for row in rows)


def test_padding_is_not_scored() -> None:
    torch.manual_seed(0)
    model = CausalLM(tiny_config()).double().eval()
    tokens = torch.randint(300, (21,))
    rows = PackedRows(tokens.int().numpy(), 8, complete=True)
    batch = torch.stack([rows[i] for i in range(len(rows))])
    scored = parallel_nll(model, batch)
    parts = add(parallel_nll(model, tokens[None, i : i + 9]) for i in (0, 8, 16))
    assert scored.tokens == parts.tokens == 20
    assert scored.total == pytest.approx(parts.total, rel=1e-12)
    converted = convert_model(model, method="window", horizon=8)
    recurrent = recurrent_nll(converted, batch, chunk=3)
    assert recurrent.tokens == 20
    assert recurrent.total == pytest.approx(parts.total, rel=1e-6)


def test_run_reports_the_perplexities_of_the_whole_split() -> None:
    config = tiny_run("data.protocol=fairseq", "trainer.max_steps=2", "trainer.precision=32-true")
    summary = train(config)
    run = Path(config.runs_dir) / config.name
    assert summary["protocol"] == json.loads((run / "data.json").read_text())["protocol"] == "fairseq"
    corpus = prepare(config.data, config.model.vocab_size, config.seed)
    tokens = torch.tensor(stream_of(corpus, "val"))
    length = config.model.max_length
    model = load_checkpoint(run / "checkpoints/last.ckpt").model
    starts = range(0, len(tokens) - 1, length)
    total = sum(parallel_nll(model, tokens[None, i : i + length + 1]).total for i in starts)
    assert summary["val/ppl"] == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-5)
    assert summary["val/ppl_recurrent"] == pytest.approx(summary["val/ppl"], rel=1e-4)
    assert summary["val/ppl_word"] == pytest.approx(math.exp(total / corpus.val.words), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=masked"], "data.protocol=fairseq: is for task=causal only, not task=masked"),
        (["data.source=hub", "data.hub_name=x"], "data.protocol=fairseq: can't hold out lines"),
    ],
)
def test_other_tasks_and_hub_data_without_validation_split_are_refused(
    words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["data.protocol=fairseq", *words])
