"""Weighted mixtures: shares, order, exact resume, tokens of several sources, and mistakes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.text_files import documents, jsonl, write
from tnnlm.config.loader import config_to_yaml, load_config
from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.data.mixture import MixedCorpus, open_text_corpus
from tnnlm.data.order import Interleaving, MixedOrder, Permutations, Share
from tnnlm.data.packing import prepare
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.data.tasks import load_task_data
from tnnlm.errors import ConfigError, DataError

SOURCES = "[{files: a.jsonl, weight: 6}, {files: [b.txt], weight: 3, name: book}, {tokens: c.npy, weight: 1}]"
WORDS = (
    f"data.sources={SOURCES}",
    "data.val_fraction=0.2",
    "data.batch_size=2",
    "model.vocab_size=290",
    "model.max_length=16",
)


@pytest.fixture(autouse=True)
def _sources() -> None:
    write("a.jsonl", jsonl(documents(40)))
    write("b.txt", "".join(f"line {i} of a book, which is another text\n" for i in range(60)))
    np.save("c.npy", np.arange(1_200) % 250 + 1)
    words = ["data.sources=[{files: a.jsonl}, {files: b.txt}]", *WORDS[1:]]
    corpus = open_text_corpus(load_config(None, words).data, 290, 0)
    Path("tokenizer.json").write_text(corpus.tokenizer.to_json(), encoding="utf-8")


def config_of(*words: str) -> Config:
    return load_config(None, [*WORDS, "data.tokenizer=tokenizer.json", *words])


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 1, 1), (1e-6, 5, 3), (1, 999)])
def test_shares_are_exact_in_every_part_of_the_order(weights: tuple[float, ...]) -> None:
    order = Interleaving(weights, seed=3)
    places = [order.place(sample) for sample in range(3_000)]
    assert places == [Interleaving(weights, seed=3).place(sample) for sample in range(3_000)]
    counts = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    for sample, (source, number) in enumerate(places):
        assert number == counts[source]
        counts[source] += 1
        assert np.abs(counts - (sample + 1) * shares).max() <= len(weights)


def test_a_million_tokens_have_the_shares_of_the_weights() -> None:
    length, shares = 512, [Share(300, 0.55), Share(7, 0.3), Share(5_000, 0.15)]
    order, n = MixedOrder(shares, 0), 1_000_000 // length
    rows = np.array([order.row(sample) for sample in range(n)])
    found = np.histogram(rows, [0, 300, 307, 5_307])[0] / n
    assert np.abs(found - [0.55, 0.3, 0.15]).max() < 0.01
    # Each source is read row by row, and again in another order.
    first = [row for row in rows if row < 300]
    assert sorted(first[:300]) == sorted(first[300:600]) == [*range(300)]
    assert first[:300] != first[300:600]


def test_one_source_has_the_order_of_earlier_versions() -> None:
    rows = [Permutations.seeded(7, 5).row(sample) for sample in range(20)]
    expected = [np.random.default_rng((5, epoch)).permutation(7) for epoch in range(3)]
    assert rows == np.concatenate(expected)[:20].tolist()


@pytest.mark.parametrize("seen", [0, 2, 6, 34])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_mixture_continues_exactly(seen: int, ranks: int) -> None:
    mixture = [Share(5, 1), Share(3, 2.5), Share(9, 0.5)]

    def order(start: int, n: int) -> list[int]:
        options: dict[str, Any] = {"batch_size": 2, "n_batches": n, "seed": 1, "mixture": mixture}
        samplers = [
            GlobalOrderSampler(17, **options, start=start, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        return [row for batches in zip(*samplers, strict=True) for row in itertools.chain(*batches)]

    assert order(seen, 10) == order(0, 40)[seen : seen + 20 * ranks]


def test_a_mixture_has_the_tokens_of_its_sources() -> None:
    config = config_of()
    corpus = open_text_corpus(config.data, 290, 0)
    assert isinstance(corpus, MixedCorpus)
    alone = load_config(
        None, ["data.files=a.jsonl", "data.tokenizer=tokenizer.json", "data.val_fraction=0.2"]
    )
    assert corpus.parts[0].folder == prepare(alone.data, 290, 0).folder
    assert corpus.parts[2].rows("train", 1).tokens[:].tolist() == (np.arange(960) % 250 + 1).tolist()
    assert corpus.train.tokens == sum(part.train.tokens for part in corpus.parts)
    report = "\n".join(corpus.report.lines())
    assert "a.jsonl: 60.0% of the training rows" in report
    assert "book: 30.0% of the training rows" in report
    data = load_task_data(config)
    assert len(data.train) == sum(share.n_rows for share in data.mixture)
    assert len(data.val) == sum(len(part.rows("val", 16)) for part in corpus.parts)
    assert data.bytes_per_token is not None
    assert 0.5 < data.bytes_per_token < 10
    assert TextDataModule(config).config == config


def test_other_weights_are_other_data() -> None:
    before = load_task_data(config_of()).report
    assert before.change(load_task_data(config_of()).report) is None
    changed = config_of(f"data.sources={SOURCES.replace('weight: 3', 'weight: 6')}")
    after = load_task_data(changed).report
    assert before.change(after) == (
        "the shares of its sources are 46.15%, 46.15%, 7.69% instead of 60.00%, 30.00%, 10.00%"
    )


def test_a_mixture_is_written_and_read_as_a_file() -> None:
    config = config_of()
    Path("c.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config("c.yaml") == config == load_config("c.yaml", saved=True)
    words = [f"data.sources={{{item}}}" for item in ("files: a.txt, weight: 6", "source: stdlib")]
    assert [part.weight for part in load_config(None, words).data.sources] == [6.0, 1.0]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{files: a.txt, weight: 0}, {files: b.txt}]", r"data\.sources\[1\]\.weight=0: must be above 0"),
        ("[{files: a.txt, weight: -1}, {files: b.txt}]", r"\.weight=-1: must be above 0"),
        ("[{files: a.txt, weight: x}, {files: b.txt}]", r"\.weight=x: expected a number"),
        ("[{files: a.txt}]", "a mixture needs two sources or more"),
        ("[{files: a.txt}, {weight: 2}]", r"data\.sources\[2\]: its data is not clear"),
        ("[{files: ''}, {files: b}]", r"data\.sources\[1\]\.files: is empty"),
        ("[{files: a.txt, document_separator: ''}, {files: b}]", "document_separator: is empty"),
        ("[{files: a.txt, hub_name: x}, {files: b}]", r"data\.sources\[1\]: its data is not clear"),
        ("[{files: a.txt}, {fils: b.txt}]", r"data\.sources\[2\]\.fils: unknown key"),
        ("[{files: a.txt, hub_split: x}, {files: b}]", r"hub_split: is not used with source=files"),
        (
            "[{hub_name: a, hub_val_split: x, validation: [b.txt]}, {files: b}]",
            r"data\.sources\[1\]\.hub_val_split: is not used with validation",
        ),
        ("[{files: a.txt}, {tokens: b.bin}]", r"data\.tokens: need the tokenizer"),
        ("[a, b]", r"data\.sources=a: expected a group .*; write data\.sources=\[\{files: "),
        ("a.txt", r"data\.sources=a\.txt: expected a group .*; write data\.sources=\[\{files: "),
        ("{files: a.txt", "expected"),
    ],
)
def test_wrong_mixtures_are_refused_in_one_line(sources: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [f"data.sources={sources}"])
    assert "\n" not in str(caught.value)
    assert "(command line)" in str(caught.value)


def test_lines_of_a_hub_data_set_in_a_mixture_are_not_held_out() -> None:
    words = ["data.protocol=fairseq", "data.sources=[{hub_name: a}, {files: b.txt}]"]
    with pytest.raises(ConfigError, match="can't hold out lines of a hub data set"):
        load_config(None, words)


def test_a_source_without_a_row_is_refused() -> None:
    np.save("c.npy", np.arange(18) + 1)
    with pytest.raises(DataError, match=r"c\.npy has 14 training tokens, where one row of 16 needs 17"):
        load_task_data(config_of())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("files: short.txt", r"^data\.sources\[2\]: too little text to hold out"),
        ("files: short.txt, text_column: x", r"^data\.sources\[2\]\.text_column=x: text files have no col"),
        ("source: tokens", r"^data\.sources\[2\]\.tokens: is empty"),
        ("files: data.txt", r"^data\.txt: no such file$"),
    ],
)
@pytest.mark.parametrize("given", ["data.tokenizer=tokenizer.json", "data.tokenizer=null"])
def test_errors_about_a_source_name_it(source: str, message: str, given: str) -> None:
    write("short.txt", "a")
    sources = f"data.sources=[{{files: a.jsonl}}, {{{source}}}]"
    with pytest.raises(DataError, match=message):
        open_text_corpus(load_config(None, [*WORDS[1:], sources, given]).data, 290, 0)
