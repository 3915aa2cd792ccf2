"""The three scripts as a user runs them: the whole workflow on one text, and every kind of invalid input."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.scripts import ROOT, SCRIPTS, assert_refused
from tests.support.training_runs import SETTINGS, write_text


def train_tiny(script: Any, *overrides: str) -> None:
    if not Path("text.txt").exists():
        write_text()
    assert script("train", *SETTINGS, *overrides).code == 0


def files() -> set[str]:
    """Return all files below the current folder, without caches."""
    return {str(path) for path in Path().rglob("*") if path.is_file() and path.parts[0] != "cache"}


def test_train_convert_generate(script: Any) -> None:
    write_text()
    trained = script("train", *SETTINGS, "trainer.max_steps=30", "optim.lr=1e-2", "optim.warmup_steps=5")
    assert trained.code == 0
    for shown in ("perplexity", "bits per byte", "step 30/30", "convert.py runs/demo"):
        assert shown in trained.out

    converted = script("convert", "--verify")
    assert converted.code == 0, converted.out
    assert converted.out.count(": ok") == 3
    report = json.loads(Path("runs/demo/converted/conversion.json").read_text())
    sizes = {"state_bytes", "etsc_state_bytes", "window_state_bytes", "kv_cache_bytes"}
    assert (
        set(report)
        == {
            "method",
            "horizon",
            "layers",
            "seconds",
            "warning",
            "ppl",
            "ppl_gap",
            "ppl_gap_error",
            "ppl_tokens",
            "step_difference",
            "protocol",
            "not_measured",
        }
        | sizes
    )
    dtypes = {"bfloat16 weights", "int8 weights"}
    assert set(report["ppl"]) == {"parallel", "recurrent", "etsc 32", "window 32"} | dtypes
    assert all(set(values) == {"32", "256"} for values in report["ppl"].values())
    certificate = {"order", "relative_tap_error", "l1_error", "tail_energy", "hankel_ratio", "largest_pole"}
    assert certificate <= set(report["layers"][0])
    assert report["method"] == "balanced"
    assert report["state_bytes"] < report["etsc_state_bytes"]
    for length in ("32", "256"):
        parallel, recurrent = report["ppl"]["parallel"][length], report["ppl"]["recurrent"][length]
        assert abs(recurrent - parallel) <= 1e-4 * parallel

    greedy = ("--prompt", "The ", "--temperature", "0", "--max-new-tokens", "12")
    shown = script("generate", *greedy)
    assert shown.code == 0
    measured = json.loads(script("generate", *greedy, "--json").out)
    assert shown.out == f"The {measured['text']}\n"
    assert set(measured) >= {
        "text",
        "prompt_tokens",
        "new_tokens",
        "prefill_seconds",
        "seconds_per_token",
        "state_bytes",
    }
    assert measured["state_bytes"] == report["state_bytes"]
    assert measured["new_tokens"] == 12
    # The recurrence attached to the checkpoint generates the same text without convert.py.
    attached = script("generate", *greedy, "--model", "runs/demo/checkpoints/best.ckpt", "--json")
    assert json.loads(attached.out)["text"] == measured["text"]
    for method in ("window", "etsc", "auto"):
        made = script("convert", "runs/demo", "--method", method, "--out", method, "--verify")
        assert made.code == 0, made.out
        written = json.loads(script("generate", *greedy, "--model", method, "--json").out)
        assert written["text"] == measured["text"]
    fitted = script("convert", "--method", "gradient", "--order", "4", "--steps", "20", "--out", "fitted")
    assert fitted.code == 0
    assert script("generate", *greedy, "--model", "fitted").code == 0


def test_generate_options(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(script, "trainer.max_steps=8")
    seeded = ("--max-new-tokens", "5", "--seed", "3")
    first = script("generate", "--prompt", "The ", *seeded)
    assert first.out == script("generate", "--prompt", "The ", *seeded).out
    many = script("generate", "--prompt", "The ", *seeded, "--num-samples", "3")
    assert many.out.count("--- sample") == 3
    samples = json.loads(script("generate", "--prompt", "The ", *seeded, "--num-samples", "3", "--json").out)
    assert len(samples["samples"]) == 3
    assert samples["samples"][0] == samples["text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße ".encode())))
    assert script("generate", "--prompt", "-", *seeded).out.startswith("Grüße ")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert script("generate", "--interactive", *seeded).code == 0


def test_short_horizon_is_reported_and_fails_verification(script: Any) -> None:
    train_tiny(script, "trainer.max_steps=8")
    result = script("convert", "--horizon", "10", "--verify", "--method", "etsc")
    assert result.code == 1
    assert "from position 10 on outputs will differ" in result.out
    assert "FAILED" in result.out


def test_dry_run_writes_nothing(script: Any) -> None:
    plan = json.loads(script("train", "--dry-run", "--json", "trainer.accumulate=3", "trainer.devices=2").out)
    assert plan["params"] == 4_504_576
    assert plan["tokens_per_update"] == 8 * 512 * 3 * 2
    assert plan["memory_bytes"] > 16 * plan["params"]
    assert plan["config"]["trainer"]["accumulate"] == 3
    short = script("train", "--dry-run", "model.n_layers=3").out
    assert "model:\n  n_layers: 3\n" in short
    assert len(short.splitlines()) < 25
    assert "estimated memory: " in short.splitlines()[-5]
    whole = script("train", "--print-config", "model.n_layers=3").out
    assert "d_model: 256" in whole
    published = script("train", "--config", str(ROOT / "configs/tnn_wt103.yaml"), "--dry-run", "--json")
    assert json.loads(published.out)["params"] == 48_666_624
    assert json.loads(published.out)["tokens_per_update"] == 65_536
    assert not list(Path().iterdir())


def test_resume_continues_the_newest_or_the_given_run(script: Any) -> None:
    train_tiny(script, "trainer.max_steps=4")
    assert_refused(script("train", "--resume"), "runs/demo", "complete at step 4", "trainer.max_steps")
    assert "continuing at step 4" in script("train", "--resume", "demo", "trainer.max_steps=6").out
    assert "continuing at step 6" in script("train", "--resume", "trainer.max_steps=8").out
    assert_refused(script("train", "--resume", "other"), "other", "no such run")


BAD_TRAINING = {
    "unknown key": (("optim.learning_rate=1",), ("optim.learning_rate", "optim.")),
    "near miss": (("model.n_layer=2",), ("model.n_layer", "did you mean model.n_layers?")),
    "no value": (("demo",), ("demo", "key=value")),
    "wrong type": (("trainer.max_steps=many",), ("trainer.max_steps", "many")),
    "negative": (("optim.lr=-1",), ("optim.lr=-1", "above 0")),
    "absurd": (("model.d_model=100000000",), ("model.d_model", "at most")),
    "missing config": (("--config", "nowhere.yaml"), ("nowhere.yaml",)),
    "missing file": (("data.source=files", "data.files=nowhere.txt"), ("nowhere.txt", "no such file")),
    "no file": (("data.source=files",), ("data.files: is empty",)),
    "empty file": (("data.source=files", "data.files=empty.txt"), ("empty.txt", "no text")),
    "binary file": (("data.source=files", "data.files=binary.txt"), ("binary.txt", "not text")),
    "too little text": (("data.source=files", "data.files=short.txt"), ("too little text",)),
    "unknown type": (("data.source=files", "data.files=data.pdf"), ("data.pdf", ".jsonl")),
    "missing tokenizer": (("data.tokenizer=nowhere/tokenizer.json",), ("nowhere/tokenizer.json",)),
    "damaged tokenizer": (("data.tokenizer=short.txt",), ("short.txt", "not a tokenizer.json")),
    "name with folder": (("name=a/b",), ("name", "folder name")),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_train_refuses_bad_input(script: Any, case: str) -> None:
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\x7fELF\x00\x01" * 100)
    Path("short.txt").write_text("Hello, world.\n")
    Path("data.pdf").write_text("%PDF")
    before = files()
    words, named = BAD_TRAINING[case]
    assert_refused(script("train", *words), *named)
    assert files() == before
    assert not Path("runs").exists()


def test_convert_and_generate_refuse_bad_input(script: Any) -> None:
    assert_refused(script("convert"), "runs", "train.py")
    assert_refused(script("generate", "--prompt", "x"), "runs", "train.py")
    train_tiny(script, "trainer.max_steps=4")
    best = Path("runs/demo/checkpoints/last.ckpt")
    Path("half.ckpt").write_bytes(best.read_bytes()[: best.stat().st_size // 2])
    torch.save({"weights": 1}, "foreign.ckpt")
    data = torch.load(best, weights_only=True)
    data["tnnlm"]["ssm"] = None
    torch.save(data, "plain.ckpt")
    Path("mine").mkdir()
    Path("mine/file").write_text("x")
    before = files()
    for target in ("half.ckpt", "foreign.ckpt", "nowhere.ckpt", "nowhere"):
        assert_refused(script("convert", target), target)
        assert_refused(script("generate", "--prompt", "x", "--model", target), target)
    assert_refused(
        script("generate", "--prompt", "x", "--model", "plain.ckpt"), "plain.ckpt", "convert.py plain.ckpt"
    )
    assert_refused(script("convert", "--out", "mine"), "mine", "exists")
    assert_refused(script("convert", "--out", "mine", "--force"), "mine", "won't replace")
    assert_refused(script("convert", "--tolerance", "0"), "tolerance 0")
    assert_refused(script("convert", "--tolerance", "1e-12"), "1e-12", "can't be met", "relative error")
    assert_refused(script("convert", "--order", "0"), "order 0")
    assert_refused(script("convert", "--order", "99999999"), "order 99999999", "at most 1,048,576")
    for horizon, bound in (("0", "at least 1"), ("-3", "at least 1"), ("99999999999", "at most 1,048,576")):
        assert_refused(script("convert", f"--horizon={horizon}"), horizon, bound)
    many = script("convert", "--horizon=many")
    assert many.code == 2
    assert "expected auto or a number: 'many'" in many.err
    assert_refused(script("generate", "--prompt", ""), "--prompt: is empty")
    for option, value in (
        ("--temperature", "-1"),
        ("--top-p", "2"),
        ("--top-k", "-2"),
        ("--max-new-tokens", "-1"),
        ("--max-new-tokens", "99999999999"),
        ("--num-samples", "0"),
        ("--seed", "-1"),
        ("--device", "toaster"),
    ):
        assert_refused(script("generate", "--prompt", "x", f"{option}={value}"), value)
    assert files() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_convert_on_a_full_or_forbidden_disk_leaves_nothing(
    script: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    train_tiny(script, "trainer.max_steps=4")
    before = files()

    def fail(tensors: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("tnnlm.checkpoints.converted.save_tensors", fail)
    assert_refused(script("convert"), "disk is full" if number == errno.ENOSPC else "permission denied")
    assert files() == before


def test_help_is_enough_to_start(script: Any) -> None:
    for name in SCRIPTS:
        shown = script(name, "--help")
        assert shown.code == 0
        assert re.search(rf"python (tools/)?{name}\.py", shown.out)
    assert script("generate").code == 2


def test_scripts_exit_with_2_and_one_line_from_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), "--prompt", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_run_after_compile_is_refused_with_the_right_order(script: Any) -> None:
    refused = script("convert", "--compile", "runs/book")
    assert refused.code == 2
    assert (
        "runs/book: is not one of float32, bfloat16, float16, int8, batch, speculate; put the run"
        in refused.err
    )
