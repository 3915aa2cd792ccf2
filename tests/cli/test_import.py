"""``tnnlm import``: from a checkpoint of another implementation to generated text, and refused input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.imported import write_fairseq, write_tokenizer
from tests.support.reference import reference
from tests.support.scripts import Result
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
    assert "data.files" in converted.out
    assert report["layers"][0]["relative_tap_error"] < 1e-5
    written = script("generate", "--model", str(imported), "--prompt", "abc", "--max-new-tokens", "5")
    assert written.code == 0, written.err
    assert "abc" in written.out


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
        (["checkpoint_best.pt", *GIVEN, "a", "model.glu_dim=9"], "[16, 8] instead of [18, 8]"),
    ],
)
def test_unsuitable_input_is_refused_in_one_line(words: list[str], reason: str, import_: Any) -> None:
    write_fairseq()
    write_tokenizer(31)
    write_tokenizer(40, Path("large.json"))
    Path("text.txt").write_text("text")
    before = files_under(Path.cwd())
    refused = import_(*words)
    assert refused.code == 2
    assert reason in refused.err
    assert refused.err.startswith("error: ")
    assert refused.err.count("\n") == 1, refused.err
    assert files_under(Path.cwd()) == before
