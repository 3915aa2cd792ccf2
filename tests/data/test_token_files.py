"""Shards of token ids: rows across their borders, continuation after a kill, and caches of version 0.1."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.training_runs import SETTINGS, write_text
from tnnlm.config.loader import load_config
from tnnlm.data import packing, token_files
from tnnlm.data.packing import PackedCorpus, PackedRows, Request, prepare
from tnnlm.data.token_files import Layout, StoredTokens, TokenWriter
from tnnlm.errors import DataError

STREAM = np.random.default_rng(0).integers(65_536, size=1_003)


def written(dtype: str, per_shard: int, blocks: int = 37) -> StoredTokens:
    """Write ``STREAM`` in blocks and return what a reader finds."""
    layout = Layout(dtype, per_shard)
    with TokenWriter(Path(), "train", layout) as writer:
        for start in range(0, len(STREAM), blocks):
            writer.write(STREAM[start : start + blocks].tolist())
    return StoredTokens(Path(), "train", layout, len(STREAM))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("per_shard", [1, 7, 59, 1_002, 1_003, 5_000])
def test_slices_and_rows_are_those_of_one_whole_stream(dtype: str, per_shard: int) -> None:
    stored = written(dtype, per_shard)
    files = sorted(Path().glob("train-*.bin"))
    assert len(files) == -(-1_003 // per_shard)
    assert max(file.stat().st_size for file in files) <= per_shard * np.dtype(dtype).itemsize
    for start, stop in [(0, 1_003), (0, 0), (5, 5), (7, 3), (6, 8), (58, 119), (1_002, 1_003), (900, 2_000)]:
        assert stored[start:stop].tolist() == STREAM[start:stop].tolist()
    for length, complete in [(1, False), (13, False), (13, True), (118, True), (2_000, True)]:
        rows, expected = PackedRows(stored, length, complete), PackedRows(STREAM, length, complete)
        assert len(rows) == len(expected)
        assert [row.tolist() for row in rows] == [row.tolist() for row in expected]


def test_shards_are_mapped_when_they_are_read_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, opened, memmap = written("<u2", 100), [], np.memmap

    def noted(path: Path, *args: Any, **named: Any) -> Any:
        opened.append(path.name)
        return memmap(path, *args, **named)

    monkeypatch.setattr(token_files.np, "memmap", noted)
    received = pickle.loads(pickle.dumps(PackedRows(stored, 10)))
    assert opened == []
    assert received[9].tolist() == STREAM[90:101].tolist()
    assert received[9].tolist() == STREAM[90:101].tolist()
    assert opened == ["train-00000.bin", "train-00001.bin"]


@pytest.mark.parametrize("n_tokens", [1, 99, 100, 101, 500, 1_003])
def test_writer_continues_behind_what_was_noted(n_tokens: int) -> None:
    layout = Layout("<u2", 100)
    whole = TokenWriter(Path(), "whole", layout)
    for token in STREAM.tolist():
        whole.write([token])
    whole.close()
    killed = TokenWriter(Path(), "train", layout)
    killed.write(STREAM[:n_tokens])
    killed.sync()
    noted = killed.checksums
    killed.write([7] * 150)  # written, but not noted
    killed.close()
    again = TokenWriter(Path(), "train", layout)
    again.resume(n_tokens, noted, "delete it")
    again.write(STREAM[n_tokens:])
    again.close()
    assert again.checksums == whole.checksums
    assert StoredTokens(Path(), "train", layout, 1_003)[:].tolist() == STREAM.tolist()
    files = {name.replace("whole", "train"): entry for name, entry in whole.files().items()}
    assert again.files() == files
    assert {name: Path(name).stat().st_size for name in files} == {n: size for n, (size, _) in files.items()}


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00002.bin"])
def test_writer_does_not_continue_a_damaged_shard(name: str) -> None:
    layout = Layout("<u2", 100)
    writer = TokenWriter(Path(), "train", layout)
    writer.write(STREAM[:250])
    writer.close()
    data = Path(name).read_bytes()
    for changed, how in [
        (data[:-1], f"{len(data) - 1} bytes instead of {len(data)}"),
        (b"\xff" + data[1:], "its checksum differs"),
    ]:
        told = re.escape(f"{name}: is damaged or was replaced ({how}); delete it")
        Path(name).write_bytes(changed)
        with pytest.raises(DataError, match=told):
            TokenWriter(Path(), "train", layout).resume(250, writer.checksums, "delete it")


def test_type_of_the_ids_follows_from_the_vocabulary() -> None:
    assert (Layout.of(65_536).dtype, Layout.of(65_537).dtype) == ("<u2", "<u4")
    assert Layout.of(300).per_shard * 2 == Layout.of(10**6).per_shard * 4 == token_files.SHARD_BYTES
    with pytest.raises(OverflowError):
        TokenWriter(Path(), "train", Layout.of(300)).write([65_536])


def corpus() -> PackedCorpus:
    return prepare(load_config(None, SETTINGS).data, 400, 0)


def tokens_of(made: PackedCorpus) -> list[list[int]]:
    return [made.rows(split, 1).tokens[:].tolist() for split in ("train", "val")]


def write_earlier() -> tuple[PackedCorpus, Path]:
    """Prepare a corpus, and write the same tokens as version 0.1 did in place of it."""
    write_text()
    made = corpus()
    made = PackedCorpus(made.folder.rename("kept"), made.tokenizer, made.report, made.layout)
    old = Request(load_config(None, SETTINGS).data, 400, 0, None).folder(packing.PACKING_VERSION - 1)
    old.mkdir()
    shutil.copy("kept/tokenizer.json", old)
    (old / "meta.json").write_text(json.dumps(made.report.to_dict()))
    for split, ids in zip(("train", "val"), tokens_of(made), strict=True):
        (old / f"{split}.bin").write_bytes(np.array(ids, np.int32).tobytes())
    return made, old


def test_cache_of_version_0_1_is_copied_without_its_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, old = write_earlier()
    before = sorted((path.name, path.read_bytes()) for path in old.iterdir())
    monkeypatch.setattr(packing, "load_corpus", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setattr(token_files, "SHARD_BYTES", 2_001)
    copied = corpus()
    assert tokens_of(copied) == tokens_of(made)
    assert (copied.report, copied.layout.per_shard) == (made.report, 1_000)
    assert copied.tokenizer.fingerprint == made.tokenizer.fingerprint
    assert capsys.readouterr().err == (
        f"{old}: not verified: written by an older version; its tokens were copied to a new folder of the "
        "cache, and this old folder may be deleted\n"
    )
    assert sorted((path.name, path.read_bytes()) for path in old.iterdir()) == before
    assert tokens_of(corpus()) == tokens_of(made)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["short", "foreign", "list", "splits", "outside", "missing"])
def test_damaged_cache_of_version_0_1_is_not_used(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    made, old = write_earlier()
    if damage == "short":
        os.truncate(old / "val.bin", 40)
    elif damage == "foreign":
        (old / "val.bin").write_bytes(b"\xff" * (old / "val.bin").stat().st_size)
    elif damage in ("splits", "outside"):
        meta = json.loads((old / "meta.json").read_text())
        val = meta["splits"].pop("val")
        if damage == "outside":
            shutil.copy(old / "val.bin", "outside.bin")
            meta["splits"][str(Path("outside").absolute())] = val
        (old / "meta.json").write_text(json.dumps(meta))
    elif damage == "list":
        (old / "meta.json").write_text("[" * 100_000)
    else:
        (old / "tokenizer.json").unlink()
    assert tokens_of(corpus()) == tokens_of(made)
    assert capsys.readouterr().err == f"{old}: is damaged and not used; this folder may be deleted\n"
    assert not Path("outside-00000.bin").exists()
