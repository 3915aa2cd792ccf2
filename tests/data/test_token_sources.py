"""Token ids that other programs prepared: arrays of nanoGPT, of NumPy and of llm.c, and Megatron's pairs."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tnnlm.config.loader import load_config
from tnnlm.config.schema import DataConfig
from tnnlm.data import token_sources
from tnnlm.data.packing import PackedCorpus, prepare
from tnnlm.data.token_sources import MAGIC
from tnnlm.errors import ConfigError, DataError
from tnnlm.tokenizer import train_bpe

EOS = "<|endoftext|>"
IDS = np.random.default_rng(0).integers(1, 270, 5_000)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sources, "BLOCK", 333)
    text = train_bpe(["a text of some words " * 9] * 3, 280, EOS, 1, progress=False).to_json()
    Path("tokenizer.json").write_text(text, encoding="utf-8")


def write_nano_gpt(folder: str, train: Any, val: Any) -> str:
    Path(folder).mkdir()
    for name, ids in (("train", train), ("val", val)):
        np.array(ids, np.uint16).tofile(f"{folder}/{name}.bin")
    return folder


def write_megatron(prefix: str, sequences: list[Any], dtype: str = "u2", code: int = 8) -> str:
    """Write sequences, each a document, as ``tools/preprocess_data.py`` of Megatron does."""
    arrays = [np.array(ids, dtype) for ids in sequences]
    Path(f"{prefix}.bin").write_bytes(b"".join(ids.tobytes() for ids in arrays))
    lengths = [len(ids) for ids in arrays]
    starts = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    header = MAGIC + struct.pack("<QBQQ", 1, code, len(arrays), len(arrays) + 1)
    columns = (lengths, np.int32), (starts, np.int64), (range(len(arrays) + 1), np.int64)
    Path(f"{prefix}.idx").write_bytes(header + b"".join(np.array([*c], t).tobytes() for c, t in columns))
    return prefix


def imported(*tokens: str, **changes: Any) -> PackedCorpus:
    config = {"source": "tokens", "tokens": [*tokens], "tokenizer": "tokenizer.json", **changes}
    return prepare(DataConfig(**config), 280, 0)


def ids_of(corpus: PackedCorpus, split: str) -> list[int]:
    return list(corpus.rows(split, 1).tokens[:].tolist())


def test_folders_of_nano_gpt_have_equal_tokens() -> None:
    corpus = imported(write_nano_gpt("shakespeare", IDS[:4_000], IDS[4_000:]))
    assert ids_of(corpus, "train") == IDS[:4_000].tolist()
    assert ids_of(corpus, "val") == IDS[4_000:].tolist()
    assert corpus.layout.dtype == "<u2"
    detokenizer = corpus.tokenizer.detokenizer
    assert corpus.val.bytes == sum(len(detokenizer.token_bytes(int(i))) for i in IDS[4_000:])
    assert corpus.report.files == 2


@pytest.mark.parametrize(("dtype", "code"), [("u2", 8), ("i4", 4)])
@pytest.mark.parametrize("name", ["text", "text.bin", "text.idx"])
def test_pairs_of_megatron_have_equal_tokens(dtype: str, code: int, name: str) -> None:
    write_megatron("text", [IDS[:10], IDS[10:1_500], IDS[1_500:]], dtype, code)
    corpus = imported(name, val_fraction=0.1)
    assert ids_of(corpus, "train") + ids_of(corpus, "val") == IDS.tolist()
    assert corpus.val.tokens == 500


def test_arrays_of_every_type_have_equal_tokens() -> None:
    np.save("a.npy", IDS[:2_000])
    IDS[2_000:3_000].astype(np.uint32).tofile("b.bin")
    assert (
        ids_of(imported("a.npy", "b.bin", token_type="uint32", val_fraction=0.01), "train")
        == IDS[:2_970].tolist()
    )
    header = np.zeros(256, np.int32)
    header[:3] = (20240520, 1, 500)
    Path("c.bin").write_bytes(header.tobytes() + IDS[:500].astype(np.uint16).tobytes())
    corpus = imported("c.bin", validation=["a.npy"])
    assert (ids_of(corpus, "train"), ids_of(corpus, "val")) == (IDS[:500].tolist(), IDS[:2_000].tolist())


def test_other_content_is_imported_again() -> None:
    np.save("a.npy", IDS)
    first = imported("a.npy").folder
    assert imported("a.npy").folder == first
    np.save("a.npy", IDS[::-1])
    assert imported("a.npy").folder != first


def damaged(name: str) -> str:
    """Write a file with a defect and return its name."""
    np.save("float.npy", IDS / 2)
    np.save("matrix.npy", IDS.reshape(2, -1))
    np.array([3, 280], np.uint16).tofile("large.bin")
    np.array([-1, 2], np.int64).tofile("negative.bin")
    Path("odd.bin").write_bytes(b"abc")
    Path("text.npy").write_text("text")
    for path, header in (("open.npy", b"((("), ("indent.npy", b"  x\n y\n"), ("key.npy", b"{[]: 1}")):
        Path(path).write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    Path("minus.bin").write_bytes(struct.pack("<3i", 20240520, 1, -500) + bytes(12))
    Path("empty").mkdir()
    write_megatron("short", [IDS[:50], IDS[50:90]])
    Path("short.bin").write_bytes(b"ab")
    write_megatron("cut", [IDS[:50], IDS[50:90]])
    Path("cut.idx").write_bytes(Path("cut.idx").read_bytes()[:60])
    write_megatron("order", [IDS[:50], IDS[50:90]])
    index = bytearray(Path("order.idx").read_bytes())
    index[len(MAGIC) + 25 + 8] = 7
    Path("order.idx").write_bytes(index)
    Path("alone.idx").write_bytes(index)
    write_megatron("header", [IDS[:50]])
    Path("header.idx").write_bytes(Path("header.idx").read_bytes()[:12])
    IDS.astype(np.uint32).tofile("wide.bin")
    return name


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [
        ("none.bin", "no such file", {}),
        ("float.npy", "has an array of float64", {}),
        ("matrix.npy", r"of shape \(2, 2500\)", {}),
        ("text.npy", "is no .npy file", {}),
        ("open.npy", "is no .npy file", {}),
        ("indent.npy", "is no .npy file", {}),
        ("key.npy", "is no .npy file", {}),
        ("minus.bin", "its header counts", {}),
        ("large.bin", "has the token id 280, of", {}),
        ("negative.bin", "has the token id -1", {"token_type": "int64"}),
        ("odd.bin", "3 bytes are no whole number of uint16 ids", {}),
        ("empty", "is a folder without .bin and .npy files", {}),
        ("short", "has another size than the 90 tokens of short.idx", {}),
        ("cut", "is truncated", {}),
        ("order", "lists sequences in another order", {}),
        ("header", r"header\.idx: is truncated", {}),
        ("alone.idx", r"alone\.bin: is missing", {}),
        ("wide.bin", "every second uint16 id is 0", {}),
        ("tokenizer.json", "unknown type of token file", {}),
    ],
)
def test_damaged_token_files_are_refused(name: str, message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=message):
        imported(damaged(name), val_fraction=0.5, **changes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for() -> None:
    os.mkfifo("pipe.bin")
    with pytest.raises(DataError, match="is not a regular file"):
        imported("pipe.bin")


def test_a_source_of_tokens_without_files_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.tokens: is empty; specify files of token ids"):
        imported()


def test_token_ids_need_their_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokens: need the tokenizer .*\(command line\)"):
        load_config(None, ["data.tokens=a.bin"])
    assert load_config(None, ["data.tokens=a.bin", "data.tokenizer=x"]).data.source == "tokens"
