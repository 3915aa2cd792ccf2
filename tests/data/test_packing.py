"""Packed tokens on disk: their stream, rows and sizes, and the validity of the cache."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tnnlm.config.schema import DataConfig
from tnnlm.data import chunks, packing, stored_texts, tokenize_split
from tnnlm.data.packing import PackedCorpus, PackedRows, prepare
from tnnlm.data.scored_bytes import bytes_per_scored_token
from tnnlm.data.sequences.symbols import symbol_tokenizer
from tnnlm.data.sources import Corpus, load_corpus
from tnnlm.data.stored_texts import StoredTexts, TextWriter
from tnnlm.data.text import words_in
from tnnlm.data.token_files import Layout
from tnnlm.errors import DataError, UserError
from tnnlm.tokenizer import TextTokenizer, train_bpe

EOS = "<|endoftext|>"
TEXTS = [f"Dokument {i}: naïve 漢字 😀 {EOS} {'x' * i}\n" for i in range(40)]


def write_corpus() -> None:
    Path("text").mkdir(exist_ok=True)
    for i, text in enumerate(TEXTS):
        Path(f"text/{i:02}.txt").write_text(text, encoding="utf-8")


def config_of(**changes: Any) -> DataConfig:
    return DataConfig(**{"source": "files", "files": ["text/*.txt"], "val_fraction": 0.2, **changes})


def prepared(vocab_size: int = 280, seed: int = 0, **changes: Any) -> PackedCorpus:
    return prepare(config_of(**changes), vocab_size, seed)


def tokens_of(corpus: PackedCorpus, split: str) -> list[int]:
    return list(corpus.rows(split, 1).tokens[:].tolist())


def save_tokenizer(name: str = "given.json", eos: str = EOS, vocab_size: int = 270) -> str:
    Path(name).write_text(train_bpe(TEXTS, vocab_size, eos, len(TEXTS), progress=False).to_json())
    return name


def cached() -> list[str]:
    """Return the names of the entries in the cache, without the tables of the datasets library."""
    folder = Path(os.environ["TNNLM_CACHE"])
    return (
        sorted(path.name for path in folder.iterdir() if path.name != "datasets") if folder.exists() else []
    )


@pytest.fixture(autouse=True)
def _corpus() -> None:
    write_corpus()


@pytest.mark.parametrize("split", ["train", "val"])
def test_stream_is_eos_document_eos(split: str) -> None:
    corpus = prepared()
    documents: list[str] = getattr(load_corpus(config_of(), 0, Path("scratch")), split)
    eos = corpus.tokenizer.eos_id
    expected = [eos]
    for text in documents:
        expected += [*corpus.tokenizer.encode(text), eos]
    assert tokens_of(corpus, split) == expected
    # The documents contain the end token as a string, but only the packing may write its id.
    assert expected.count(eos) == len(documents) + 1


def test_stream_decodes_to_the_documents() -> None:
    corpus = prepared()
    assert corpus.tokenizer.decode(tokens_of(corpus, "val")) == "".join(
        load_corpus(config_of(), 0, Path("scratch")).val
    )


def test_batches_of_documents_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens_of(prepared(), "train")
    monkeypatch.setattr(
        tokenize_split, "batches_of", lambda *args: ([part] for part in chunks.exact_chunks_of(*args))
    )
    assert tokens_of(prepared(cache_dir="other"), "train") == whole


def test_rows_overlap_by_one_token() -> None:
    corpus = prepared()
    stream = torch.tensor(tokens_of(corpus, "train"))
    rows = corpus.rows("train", 7)
    assert len(rows) == (len(stream) - 1) // 7
    inputs = torch.cat([rows[i][:-1] for i in range(len(rows))])
    targets = torch.cat([rows[i][1:] for i in range(len(rows))])
    assert torch.equal(inputs, stream[: len(inputs)])
    assert torch.equal(targets, stream[1 : len(targets) + 1])
    assert rows[0].dtype == torch.int64


@pytest.mark.parametrize(("n_tokens", "n_rows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_rows_have_full_length(n_tokens: int, n_rows: int) -> None:
    rows = PackedRows(np.arange(n_tokens, dtype=np.int32), 4)
    assert len(rows) == n_rows
    assert all(len(rows[i]) == 5 for i in range(n_rows))


def test_rows_end() -> None:
    # Without an IndexError after the last row, `for row in rows` would yield empty rows for ever.
    rows = PackedRows(np.arange(9, dtype=np.int32), 4)
    with pytest.raises(IndexError):
        rows[2]


def test_rows_stop_at_max_tokens() -> None:
    corpus = prepared()
    # max_tokens counts predicted tokens; the first token is only an input.
    assert len(corpus.rows("train", 4, max_tokens=12)) == 3
    assert len(corpus.rows("train", 4, max_tokens=3)) == 0
    assert len(corpus.rows("train", 4, max_tokens=10**9)) == len(corpus.rows("train", 4))


@pytest.mark.parametrize("split", ["train", "val"])
def test_bytes_per_token_counts_utf8(split: str) -> None:
    corpus = prepared()
    documents = getattr(load_corpus(config_of(), 0, Path("scratch")), split)
    info = getattr(corpus, split)
    n_bytes = sum(len(text.encode()) for text in documents)
    n_tokens = len(tokens_of(corpus, split))
    assert (info.documents, info.tokens, info.bytes) == (len(documents), n_tokens, n_bytes)
    assert info.bytes_per_token == n_bytes / n_tokens
    assert n_bytes > sum(map(len, documents))


@pytest.mark.parametrize("limit", [None, 8, 50])
def test_bytes_per_scored_token_are_those_of_the_targets(limit: int | None) -> None:
    # The second half of the text has several bytes per character.
    Path("one.txt").write_text("word " * 300 + "漢字とかな" * 60, encoding="utf-8")
    corpus = prepared(files=["one.txt"], val_fraction=0.5)
    rows = corpus.rows("val", 7, limit)
    targets = [int(token) for row in rows for token in row[1:]]
    words = [token for token in targets if token != corpus.tokenizer.eos_id]
    text = b"".join(map(corpus.tokenizer.detokenizer.token_bytes, words))
    assert bytes_per_scored_token(corpus, rows, "val") == pytest.approx(len(text) / len(targets), rel=1e-12)
    if limit is not None:
        assert bytes_per_scored_token(corpus, rows, "val") != pytest.approx(corpus.val.bytes_per_token, 0.1)


def test_bytes_per_scored_token_scale_to_the_text_of_a_tokenizer_that_changes_it() -> None:
    given = json.loads(Path(save_tokenizer()).read_text())
    given["normalizer"] = {"type": "Replace", "pattern": {"String": "x"}, "content": ""}
    Path("given.json").write_text(json.dumps(given))
    corpus = prepared(tokenizer="given.json")
    rows = corpus.rows("val", 1)
    found = bytes_per_scored_token(corpus, rows, "val") * len(rows)
    assert found == pytest.approx(corpus.val.bytes, rel=1e-12)


def test_tokenizer_learns_from_the_training_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(train=["aaaa bbbb"] * 20, val=["zqzqzqzq"] * 20)
    monkeypatch.setattr(packing, "load_corpus", lambda *_: corpus)
    vocabulary = prepared().tokenizer.tokenizer.get_vocab()
    assert "zq" not in vocabulary
    assert "aa" in vocabulary


def test_cache_is_hit_without_tokenizing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared()

    def fail(*_: object) -> Corpus:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(packing, "load_corpus", fail)
    second = prepared()
    assert second.folder == first.folder
    assert (second.train, second.val) == (first.train, first.val)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(AssertionError, match="tokenized again"):
        prepared(seed=1)


def test_cache_key_is_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared()
    monkeypatch.chdir(tmp_path / "text")
    assert prepared(files=["*.txt"]).folder == first.folder


def grow_file() -> None:
    Path("text/00.txt").write_text("longer " * 50)
    os.utime("text/00.txt", (1, 1))


def test_cache_key_changes_with_the_content_of_files_and_not_with_their_time() -> None:
    os.utime("text/00.txt", (1, 1))
    folders = {prepared().folder}
    os.utime("text/00.txt", (2, 2))
    assert prepared().folder in folders
    grow_file()
    folders.add(prepared().folder)
    before = Path("text/00.txt").read_text()
    Path("text/00.txt").write_text(before.upper())  # the same size and time
    os.utime("text/00.txt", (1, 1))
    folders.add(prepared().folder)
    Path("text/new.txt").write_text("one more")
    folders.add(prepared().folder)
    assert len(folders) == 4


def test_cache_key_is_the_same_after_the_folder_moved() -> None:
    first = prepared()
    Path("text").rename("moved")
    assert prepared(files=["moved/*.txt"]).folder == first.folder


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 281},
        {"seed": 1},
        {"val_fraction": 0.3},
        {"max_documents": 30},
        {"eos_token": "<end>"},
        {"files": ["text/0*.txt"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_cache_key_changes_with_what_decides_the_tokens(changes: dict[str, Any]) -> None:
    assert prepared(**changes).folder != prepared().folder


@pytest.mark.parametrize(
    "changes", [{"batch_size": 3}, {"max_val_tokens": 9}, {"num_workers": 1}], ids=lambda c: next(iter(c))
)
def test_cache_key_does_not_depend_on_how_rows_are_loaded(changes: dict[str, Any]) -> None:
    assert prepared(**changes).folder == prepared().folder


def test_cache_key_of_a_given_tokenizer_changes_with_the_tokenizer_not_the_vocabulary_size() -> None:
    first = prepared(tokenizer=save_tokenizer())
    assert prepared(tokenizer="given.json", vocab_size=400).folder == first.folder
    assert prepared(tokenizer=save_tokenizer(vocab_size=275)).folder != first.folder


def test_cache_key_of_a_given_tokenizer_changes_with_the_end_token() -> None:
    # A tokenizer may hold several special tokens, and the stream depends on which one ends documents.
    given = json.loads(Path(save_tokenizer()).read_text())
    extra = {**given["added_tokens"][0], "id": 270, "content": "<other>"}
    given["added_tokens"].append(extra)
    Path("given.json").write_text(json.dumps(given))
    for eos in (EOS, "<other>"):
        corpus = prepared(tokenizer="given.json", eos_token=eos)
        assert tokens_of(corpus, "val")[0] == corpus.tokenizer.eos_id


@pytest.mark.parametrize("setting", ["eos_token", "mask_token"])
@pytest.mark.parametrize("token", ["e", "the", "Ġthe", "###", "é"])
def test_special_token_that_text_may_contain_is_refused(setting: str, token: str) -> None:
    with pytest.raises(
        DataError, match=rf"^data\.{setting}={token}: is a word that the text may contain; set"
    ):
        prepared(**{setting: token})
    assert cached() == []


@pytest.mark.parametrize("setting", ["eos_token", "mask_token"])
def test_special_token_that_is_text_of_the_given_tokenizer_is_refused(setting: str) -> None:
    save_tokenizer()
    with pytest.raises(DataError, match=rf"^data\.{setting}=e: is ordinary text in the vocabulary"):
        prepared(tokenizer="given.json", **{setting: "e"})
    assert cached() == []
    # A special token of the vocabulary may be a word.
    given = json.loads(Path("given.json").read_text())
    given["added_tokens"].append({**given["added_tokens"][0], "id": 270, "content": "END"})
    Path("given.json").write_text(json.dumps(given))
    assert prepared(tokenizer="given.json", **{setting: "END"}, vocab_size=300).tokenizer.size == 271


@pytest.mark.parametrize(("task", "token"), [("listops", "[MAX"), ("text", "e")])
def test_padding_that_is_a_symbol_is_refused(task: str, token: str) -> None:
    with pytest.raises(DataError, match="is a symbol of the task"):
        symbol_tokenizer(task, token)


def test_given_tokenizer_is_used_and_kept_with_the_tokens() -> None:
    corpus = prepared(tokenizer=save_tokenizer())
    text = (corpus.folder / "tokenizer.json").read_text()
    assert json.loads(text) == json.loads(Path("given.json").read_text())


def test_given_tokenizer_that_is_too_big_is_an_error_that_says_what_to_set() -> None:
    save_tokenizer()
    with pytest.raises(
        DataError, match=r"given\.json: has 270 tokens, the model only 269.*model\.vocab_size=270"
    ):
        prepared(tokenizer="given.json", vocab_size=269)
    assert cached() == []
    prepared(tokenizer="given.json", vocab_size=270)


def test_failed_build_leaves_nothing_in_the_cache() -> None:
    Path("text/39.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"39\.txt"):
        prepared()
    assert cached() == []


def test_interrupted_build_leaves_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:  # the latest point: both splits are already written
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "write_meta", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepared()
    assert cached() == []


def test_text_too_small_for_validation_is_an_error() -> None:
    Path("one.txt").write_text("x")
    with pytest.raises(DataError, match="too little text"):
        prepared(files=["one.txt"])
    assert cached() == []


@pytest.mark.parametrize(("folder", "told"), [("file", "file: is a file"), ("file/a/b", "/file is a file")])
def test_cache_folder_that_is_a_file_is_refused(folder: str, told: str) -> None:
    Path("file").write_text("")
    with pytest.raises(UserError, match=f"{told}, not a folder; choose another path"):
        prepared(cache_dir=folder)


def test_cache_holds_the_corpus_alone() -> None:
    corpus = prepared()
    assert cached() == [corpus.folder.name]
    names = sorted(path.name for path in corpus.folder.iterdir())
    assert names == ["meta.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"]


def spaced(pre_tokenizer: Any, normalizer: Any = None) -> TextTokenizer:
    """Return a tokenizer that treats the beginning of a text differently from its middle."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?", EOS], show_progress=False)
    tokenizer.train_from_iterator([LONG], trainer)
    return TextTokenizer(tokenizer, EOS)


LONG = "".join(f"line  {n} of it.\n" + "\n\n    indented {n}\n" * (n % 3) for n in range(400))
BYTES = pre_tokenizers.ByteLevel
TOKENIZERS: dict[str, Callable[[], TextTokenizer]] = {
    "byte level": lambda: train_bpe([LONG], 300, EOS, 1, False),
    "prefix": lambda: spaced(BYTES(add_prefix_space=True)),
    "metaspace": lambda: spaced(pre_tokenizers.Metaspace()),
    "metaspace of lines": lambda: spaced(pre_tokenizers.Metaspace(), normalizers.Replace("\n", " ")),
    "prepended": lambda: spaced(BYTES(add_prefix_space=False), normalizers.Prepend("_")),
    "stripped": lambda: spaced(pre_tokenizers.Metaspace(), normalizers.Strip()),
    "lines": lambda: spaced(pre_tokenizers.Split(Regex("^.*$"), "isolated")),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_long_documents_in_chunks_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    monkeypatch.setattr(chunks, "CHUNK", 100)
    monkeypatch.setattr(chunks, "CONTEXT", 40)
    assert len(list(chunks.exact_chunks_of([[LONG]], tokenizer))) > 50
    layout = Layout.of(tokenizer.size)
    info, _ = tokenize_split.tokenize_split([LONG, "short"], tokenizer, Path(), "test", layout)
    found = np.fromfile("test-00000.bin", dtype=layout.dtype).tolist()
    eos = tokenizer.eos_id
    assert found == [eos, *tokenizer.encode(LONG), eos, *tokenizer.encode("short"), eos]
    assert info.tokens == len(found)
    assert info.bytes == len(LONG) + 5


class WholeText:
    """Encoder whose tokens depend on the whole text."""

    def encode(self, text: str) -> list[int]:
        return [len(text)] * len(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self.encode(text), [(i, i + 1) for i in range(len(text))]


def test_document_without_a_seam_is_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1_000)
    for text in ("x" * 5_000, LONG):
        assert [len(c.text) for c in chunks.exact_chunks_of([[text]], WholeText())] == [len(text)]


AWKWARD = {
    "one word": "".join(random.Random(0).choices("abcdefgh", k=3_000)),
    "one letter": "a" * 3_000,
    "spaces": "a" + " " * 1_500 + "b " + " \n" * 700 + "end",
    "carriage returns": "line\r\nof\r\n\r\ntext" * 200,
    "digits": "0123456789" * 300,
    "no white space": 'value={"key":[1,22,333],"other":"text"};' * 80,
    "long characters": "漢字かな😀é" * 500,
    "joined characters": "e\u0301👩\u200d👩\u200d👧" * 300,
    "short": "漢",
}


@pytest.mark.parametrize("kind", ["byte level", "long tokens", "prefix", "metaspace", "prepended"])
def test_awkward_texts_in_pieces_give_the_tokens_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "long tokens":  # of a repeated text, longer than a chunk
        tokenizer = train_bpe([LONG, *AWKWARD.values()], 420, EOS, 1, False)
    else:
        tokenizer = TOKENIZERS[kind]()
    monkeypatch.setattr(chunks, "CHUNK", 100)
    monkeypatch.setattr(chunks, "CONTEXT", 40)
    monkeypatch.setattr(stored_texts, "PIECE", 7)
    with TextWriter(Path("texts"), 0) as writer:
        for text in AWKWARD.values():
            assert writer.add(text[i : i + 11] for i in range(0, len(text), 11))
    places = writer.columns()
    texts = StoredTexts(Path("texts"), places["starts"], places["stops"], 0)
    assert list(texts) == list(AWKWARD.values())
    layout = Layout.of(tokenizer.size)
    info, _ = tokenize_split.tokenize_split(texts, tokenizer, Path(), "test", layout)
    found = np.fromfile("test-00000.bin", dtype=layout.dtype).tolist()
    expected = [tokenizer.eos_id]
    for text in AWKWARD.values():
        expected += [*tokenizer.encode(text), tokenizer.eos_id]
    assert found == expected
    assert info.words == sum(words_in(text, True) for text in AWKWARD.values())
    for text in AWKWARD.values() if kind == "byte level" else ():
        parts = list(chunks.exact_chunks_of([[text]], tokenizer))
        assert "".join(part.text for part in parts) == text
        assert len(text) < 1_000 or max(len(part.text) for part in parts) <= 300
