"""Checksums notice a file that another valid one replaced, and errors name weights that are not finite."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.converted import write_converted
from tests.support.imported import write_fairseq, write_tokenizer
from tests.support.scripts import ROOT
from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.converted import load_converted
from tnnlm.checkpoints.importers.formats import import_checkpoint
from tnnlm.checkpoints.importers.run import write_run
from tnnlm.checkpoints.importers.vocabulary import load_tokenizer
from tnnlm.checkpoints.manifest import write_checksums
from tnnlm.checkpoints.training import load_any, load_checkpoint
from tnnlm.errors import CheckpointError
from tnnlm.tokenizer import TextTokenizer, train_bpe
from tnnlm.training.callbacks.checkpoint import AtomicCheckpointIO
from tnnlm.training.initial import InitialWeights
from tnnlm.training.run import train

OLD = ROOT / "tests/fixtures/version_0.1.0"


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return train_bpe(["some words and some more words"], 300, "<|endoftext|>", 1, False)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_converted(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_valid_file_of_another_model_is_noticed(name: str, tokenizer: TextTokenizer) -> None:
    write_converted(Path("one"), tokenizer)
    torch.manual_seed(7)
    other = train_bpe(["quite different words, other merges"], 300, "<|endoftext|>", 1, False)
    write_converted(Path("two"), other)
    shutil.copy(Path("two") / name, Path("one") / name)
    assert name in refused(Path("one"))


def test_a_folder_whose_checksums_were_removed_is_refused(tokenizer: TextTokenizer) -> None:
    write_converted(Path("out"), tokenizer)
    Path("out/checksums.json").unlink()
    assert refused(Path("out")) == "out/checksums.json: is missing; convert again"


def test_weights_of_an_older_version_are_compared_with_their_hash(caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(OLD / "runs/old/converted", "old")
    load_converted(Path("old"))
    assert caplog.messages == ["old: not verified: written by an older version"]
    path = Path("old/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "config.json states another hash" in refused(Path("old"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float, tokenizer: TextTokenizer) -> None:
    write_converted(Path("out"), tokenizer)
    tensors = load_file("out/model.safetensors")
    name = "blocks.1.mixer.in_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = value
    save_file(tensors, "out/model.safetensors")
    write_checksums(Path("out"))
    assert f"{name} contains NaN or infinity" in refused(Path("out"))


def test_large_weights_whose_sum_overflows_are_accepted(tokenizer: TextTokenizer) -> None:
    write_converted(Path("out"), tokenizer)
    tensors = load_file("out/model.safetensors")
    tensors["embedding.weight"] = torch.full_like(tensors["embedding.weight"], 3e38)
    save_file(tensors, "out/model.safetensors")
    config = json.loads(Path("out/config.json").read_text())
    Path("out/config.json").write_text(json.dumps(config))
    write_checksums(Path("out"))
    assert load_converted(Path("out")).model.embedding.weight.max() > 2e38


def test_a_checkpoint_of_another_run_or_with_bad_weights_is_refused(run_here: Path) -> None:
    best = run_here / "checkpoints/best.ckpt"
    data = torch.load(best, weights_only=True)
    name = "model.embedding.weight"
    data["state_dict"][name][3, 3] = float("inf")
    torch.save(data, "bad.ckpt")
    for load in (load_checkpoint, load_any):
        with pytest.raises(CheckpointError, match=r"bad\.ckpt: embedding\.weight contains NaN or infinity"):
            load(Path("bad.ckpt"))
    train(tiny_run("name=other", "trainer.max_steps=1", "seed=5"), None)
    shutil.copy("runs/other/checkpoints/last.ckpt", best)
    with pytest.raises(CheckpointError, match=r"best\.ckpt: is of another run, it has seed=5"):
        InitialWeights(str(run_here))
    shutil.copy("runs/other/checkpoints/last.ckpt", "alone.ckpt")
    assert load_checkpoint(Path("alone.ckpt")).config.seed == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of the file size")
@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_limit_of_the_file_size_is_reported_in_one_line(limit: int) -> None:
    import resource

    source, letters = write_fairseq(), write_tokenizer(12)
    imported = import_checkpoint(source, overrides=("model.max_length=16",))
    tokenizer = load_tokenizer(imported.format, letters, None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .run/checkpoints/last\.ckpt"):
            write_run(Path("run"), source, imported, tokenizer)
        with pytest.raises(OSError, match=r"File too large: .last\.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(9_000)}, Path("last.ckpt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in Path().iterdir()) == [source.name, letters.name]
