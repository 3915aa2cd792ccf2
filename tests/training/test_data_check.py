"""A resumed run continues only on the data that it was started with, which is compared by content."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.archive_files import WRITERS
from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.cli import run
from tnnlm.tokenizer import train_bpe

RUN = Path("runs/demo")
STEPS = ["trainer.max_steps=2", "trainer.val_every_n_steps=2", "checkpoint.every_n_steps=2"]
STEPS += ["trainer.sample_tokens=0", "model.n_layers=1"]
MORE = ("--resume", "demo", "trainer.max_steps=4")


def tree() -> dict[str, bytes]:
    """Return the content of every file of the run."""
    return {str(path): path.read_bytes() for path in sorted(RUN.rglob("*")) if path.is_file()}


def start(script: Any, *words: str) -> None:
    """Train two steps on text.txt, with a tokenizer that is given."""
    if not Path("text.txt").exists():
        write_text()
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("given.json").write_text(train_bpe([text], 300, "<|endoftext|>", 1, False).to_json())
    done = script("train", *SETTINGS, *STEPS, "data.tokenizer=given.json", *words)
    assert done.code == 0, done.err


def refused(script: Any, *words: str) -> str:
    """Return the line with which a resume is refused; no file of the run has changed then."""
    before = tree()
    result = script("train", *MORE, *words)
    assert result.code == 2, result.err
    assert result.err.count("\n") == 1
    assert tree() == before
    return str(result.err)


def same_time(path: Path, text: str) -> None:
    """Rewrite a file and restore its modification time."""
    status = path.stat()
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("task", ["causal", "masked"])
def test_resume_on_other_text_is_refused_and_on_the_same_elsewhere_goes_on(task: str, script: Any) -> None:
    start(script, f"task={task}")
    text = Path("text.txt").read_text(encoding="utf-8")
    same_time(Path("text.txt"), text.replace("the", "eht"))
    message = refused(script)
    assert message.startswith(f"error: {RUN}: its data has changed: the train split has other content")
    assert "restore the original data, or start a new run" in message
    same_time(Path("text.txt"), text[: len(text) // 2])
    assert "instead of" in refused(script)
    same_time(Path("text.txt"), text)
    assert "the train split has" in refused(script, "data.val_fraction=0.2")
    Path("more.txt").write_text("more text\n" * 99)
    assert "the train split has" in refused(script, "data.files=[text.txt,more.txt]")
    assert "the train split has" in refused(script, "data.files=more.txt")
    Path("elsewhere").mkdir()
    Path("text.txt").rename("elsewhere/moved.txt")
    done = script("train", *MORE, "data.files=elsewhere/moved.txt")
    assert done.code == 0, done.err


def test_held_out_text_is_never_trained_on_after_the_end_has_changed(script: Any) -> None:
    # The end of a single file is the validation split; a longer file would move it into the training split.
    start(script)
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("text.txt").write_text(text + text[:3_000], encoding="utf-8")
    assert "its data has changed: the train split has" in refused(script)


def test_converted_model_is_not_measured_on_other_text(script: Any) -> None:
    start(script)
    text = Path("text.txt").read_text(encoding="utf-8")
    same_time(Path("text.txt"), text.replace("the", "eht"))
    done = script("convert", "demo", "--horizon", "64")
    assert done.code == 0, done.err
    assert "no perplexities: the data of this run has changed" in done.out + done.err


def test_other_end_token_of_a_given_tokenizer_is_refused(script: Any) -> None:
    write_text()
    given = json.loads(train_bpe(["some text"], 300, "<|endoftext|>", 1, False, "<end>").to_json())
    start(script)
    Path("given.json").write_text(json.dumps(given))
    shutil.rmtree(RUN)
    done = script("train", *SETTINGS, *STEPS, "data.tokenizer=given.json")
    assert done.code == 0, done.err
    assert "data.eos_token is '<end>' instead of '<|endoftext|>'" in refused(script, "data.eos_token=<end>")


@pytest.mark.parametrize("task", ["listops", "text", "image"])
def test_resume_on_other_sequences_is_refused(task: str, script: Any) -> None:
    folder = Path("lra")
    WRITERS[task](folder)
    sizes = {"listops": (10, 16), "text": (2, 257), "image": (10, 257)}[task]
    words = ["task=classify", "data.source=lra", f"data.lra.task={task}", f"data.lra.folder={folder}"]
    words += [f"model.n_classes={sizes[0]}", f"model.vocab_size={sizes[1]}", "data.batch_size=4"]
    words += ["model.max_length=1024", "data.val_fraction=0.2", *STEPS]
    kept = [word for word in SETTINGS if word.startswith(("model.d_", "model.kernel", "trainer.acc"))]
    done = script("train", *kept, *words)
    assert done.code == 0, done.err
    if task != "listops":  # which has a published validation split
        assert "its data has changed: the train split has" in refused(script, "data.val_fraction=0.4")
    if task == "image":
        batches = folder / "cifar-10-batches-py"
        shutil.copy(batches / "data_batch_2", batches / "data_batch_1")
    elif task == "text":
        for path in (folder / "aclImdb/train/pos").iterdir():
            same_time(path, path.read_text().upper())
    else:
        path = folder / "listops-1000/basic_train.tsv"
        same_time(path, path.read_text().replace("[MIN", "[MAX"))
    assert "its data has changed: the train split has" in refused(script)


def test_report_is_printed_and_stored(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_text()
    shutil.copy(ROOT / "tests/cases/crlf.txt", "crlf.txt")
    shutil.copy(ROOT / "tests/cases/empty.jsonl", "empty.jsonl")
    words = [word for word in SETTINGS if not word.startswith("data.files")]
    words += [*STEPS, "data.files=[text.txt,crlf.txt,empty.jsonl]"]
    for name in ("demo", "demo-2"):  # the second finds the text in the cache
        done = script("train", *words)
        assert done.code == 0, done.err
        lines = done.out.splitlines()
        assert "data: 3 files, 2 documents; normalized 59 carriage returns" in lines
        assert "warning: empty.jsonl: contains no text, skipped" in lines
        assert any(line.startswith("train: 2 documents, ") and "; val: 2 documents" in line for line in lines)
        report = json.loads(Path(f"runs/{name}/data.json").read_text())
        assert json.loads(Path(f"runs/{name}/summary.json").read_text())["data"] == report
        assert len(report["splits"]["train"]["sha256"]) == 64
    capsys.readouterr()
    assert run("prepare-data", words) == 0
    assert "data: 3 files, 2 documents; normalized 59" in capsys.readouterr().out


def test_run_without_a_report_resumes_with_the_text_as_it_was(script: Any) -> None:
    write_text()
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("text.txt").write_bytes(text.replace("\n", "\r\n").encode())
    start(script, "data.normalize_text=false")
    (RUN / "data.json").unlink()
    settings = yaml.safe_load((RUN / "config.yaml").read_text())
    del settings["data"]["normalize_text"]
    (RUN / "config.yaml").write_text(yaml.safe_dump(settings))
    done = script("train", *MORE)
    assert done.code == 0, done.err
    report = json.loads((RUN / "data.json").read_text())
    assert report["normalized"] == {}
    assert yaml.safe_load((RUN / "config.yaml").read_text())["data"]["normalize_text"] is False


@pytest.mark.parametrize("content", ["{", "[]", '{"splits": {"train": {}}}', '{"splits": 3}'])
def test_damaged_report_is_refused_in_one_line(content: str, script: Any) -> None:
    start(script)
    (RUN / "data.json").write_text(content)
    assert re.search(
        r"data\.json: is damaged \(.*\); restore it, or remove it to skip this check", refused(script)
    )
