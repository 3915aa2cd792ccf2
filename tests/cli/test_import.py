"""``tnnlm import``: from a checkpoint of another implementation to generated text, and refused input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.imported import hyenadna_weights, write_fairseq, write_tokenizer
from tests.support.reference import reference
from tests.support.scripts import Result, assert_refused
from tests.support.training_runs import SETTINGS, write_text
from tests.support.unchanged import files_under
from tnnlm.checkpoints.locate import load_trained
from tnnlm.cli import run

GIVEN = ("--tokenizer", "tokenizer.json", "--output")


@pytest.fixture
def import_(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls ``tnnlm import`` in this process."""

    def call(*words: str) -> Result:
        capsys.readouterr()
        code = run("import", list(words))
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def imported(import_: Any) -> Path:
    """Return the run of the imported reference TNN."""
    write_fairseq()
    write_tokenizer(31)
    done = import_("checkpoint_best.pt", "--output", "runs/tnn", "--tokenizer", "tokenizer.json")
    assert done.code == 0, done.err
    return Path("runs/tnn")


def test_imported_model_converts_and_generates(imported: Path, script: Any) -> None:
    tensors, _ = reference("tnn_lm_fairseq_wiring")
    trained = load_trained(imported)
    logits = trained.model.double()(tensors["tokens"].long())
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-11)
    converted = script("convert", str(imported), "--method", "etsc", "--verify")
    assert converted.code == 0, converted.err
    report = json.loads((imported / "converted/conversion.json").read_text())
    assert "no perplexities: the training data of imported weights is not known" in converted.out
    assert report["layers"][0]["relative_tap_error"] < 1e-5
    written = script("generate", "--model", str(imported), "--prompt", "abc", "--max-new-tokens", "5")
    assert written.code == 0, written.err
    assert "abc" in written.out


def test_imported_hyenadna_converts_generates_and_trains_on(import_: Any, script: Any) -> None:
    torch.save({"state_dict": hyenadna_weights(8, length=48, width=6)}, "dna.ckpt")
    done = import_("dna.ckpt", "--output", "runs/dna")
    assert done.code == 0, done.err
    converted = script("convert", "runs/dna", "--method", "window", "--verify", "--export")
    assert converted.code == 0, converted.err
    words = ["--model", "runs/dna", "--prompt", "ACGTACGT", "--max-new-tokens", "5", "--temperature", "0"]
    written = script("generate", *words)
    assert written.code == 0, written.err
    Path("text.txt").write_text("\n\n".join("ACGTNCCA" * (index + 9) for index in range(60)))
    trained = script("train", *training("name=on", "conversion.method=window"), "--init-from", "runs/dna")
    assert trained.code == 0, trained.err
    assert load_trained("runs/on").config.model.block == "hyena"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["checkpoint_best.pt", *GIVEN, "text.txt"], "already exists"),
        (["checkpoint_best.pt", *GIVEN, "text.txt/a"], "is a file"),
        (["checkpoint_best.pt", "--output", "a"], "has no tokenizer; give one with --tokenizer"),
        (["checkpoint_best.pt", "--output", "a", "--tokenizer", "none.json"], "no such file"),
        (["checkpoint_best.pt", "--output", "a", "--tokenizer", "text.txt"], "not a tokenizer.json"),
        (["checkpoint_best.pt", "--output", "a", "--tokenizer", "large.json"], "has 40 tokens"),
        (["checkpoint_best.pt", *GIVEN, "a", "--eos-token", "</s>"], "name its end token with --eos-token"),
        (["text.txt", *GIVEN, "a"], "is not a checkpoint"),
        (["checkpoint_best.pt", *GIVEN, "a", "model.nothing=3"], "model.nothing: unknown key"),
        (["checkpoint_best.pt", *GIVEN, "a", "model.glu_dim=9"], ": follows from the weights (8); omit it"),
        (["checkpoint_best.pt", *GIVEN, "a", "name=foo"], "name=foo: is not a setting of the model"),
        (["checkpoint_best.pt", *GIVEN, ""], "--output: is empty"),
        (["checkpoint_best.pt", "--output", "a", "--tokenizer", ""], "--tokenizer: is empty"),
        (["", *GIVEN, "a"], "SOURCE: is empty"),
        (["checkpoint_best.pt", *GIVEN, "a", "--eos-token", "b"], "--eos-token=b: is ordinary text"),
        (["checkpoint_best.pt", *GIVEN, "a", "--eos-token", ""], "has no token ''"),
        (["dna.ckpt", "--output", "a", "--eos-token", "A"], "--eos-token=A: is ordinary text"),
        (["dna.ckpt", "--output", "a", "--eos-token", "nope"], "name its end token with --eos-token"),
    ],
)
def test_unsuitable_input_is_refused_in_one_line(words: list[str], reason: str, import_: Any) -> None:
    write_fairseq()
    write_tokenizer(31)
    write_tokenizer(40, Path("large.json"))
    torch.save(hyenadna_weights(8, length=40, width=6), "dna.ckpt")
    Path("text.txt").write_text("text")
    before = files_under(Path.cwd())
    refused = import_(*words)
    assert refused.code == 2
    assert reason in refused.err
    assert refused.err.startswith("error: ")
    assert refused.err.count("\n") == 1, refused.err
    assert files_under(Path.cwd()) == before


def training(*words: str) -> list[str]:
    """Return the settings of a short run on text.txt, without those of the model."""
    settings = [word for word in SETTINGS if not word.startswith("model.")]
    return [*settings, "trainer.max_steps=3", "trainer.val_every_n_steps=3", *words]


def test_imported_model_trains_on_converts_and_generates(imported: Path, script: Any) -> None:
    write_text()
    still = ["optim.lr=1e-12", "optim.weight_decay=0", "model.max_length=48", "name=on"]
    trained = script("train", *training(*still), "--init-from", "tnn")
    assert trained.code == 0, trained.err
    before, after = (load_trained(run) for run in (imported, "runs/on"))
    assert (after.step, after.config.model.max_length) == (3, 48)
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    for name, tensor in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], tensor.float(), rtol=0, atol=1e-9)
    converted = script("convert", "runs/on", "--method", "window", "--verify")
    assert converted.code == 0, converted.err
    written = script("generate", "--model", "runs/on", "--prompt", "abc", "--max-new-tokens", "5")
    assert written.code == 0, written.err


def test_trained_run_starts_another_with_its_tokenizer(run_here: Path, script: Any) -> None:
    started = script("train", *training("optim.lr=1e-3", "name=next"), "--init-from", str(run_here))
    assert started.code == 0, started.err
    before, after = (load_trained(run) for run in (run_here, "runs/next"))
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    moved = after.model.embedding.weight != before.model.embedding.weight
    assert moved.any()
    other = training("model.expand=2", "model.kernel.decay=0.9")
    refused = script("train", *other, "--init-from", str(run_here))
    found = "model.expand=3, model.kernel.decay=0.95; omit model.expand=2, model.kernel.decay=0.9"
    assert_refused(refused, found)
    copied = Path(shutil.copy(run_here / "checkpoints/last.ckpt", "alone.ckpt"))
    alone = script("train", *training("name=alone"), "--init-from", str(copied))
    assert alone.code == 0, alone.err
    assert load_trained("runs/alone").tokenizer.fingerprint == before.tokenizer.fingerprint
    write_tokenizer(31, Path("other.json"))
    refused = script("train", *training("data.tokenizer=other.json"), "--init-from", str(copied))
    assert_refused(refused, "alone.ckpt", "another tokenizer")
    assert_refused(script("train", "--resume", "--init-from", "tiny"), "--init-from")


def test_imported_run_cannot_be_resumed(imported: Path, script: Any) -> None:
    assert_refused(script("train", "--resume", str(imported)), str(imported), "--init-from")
