"""A run, a converted model and a saved state of version 0.1.0 still work unchanged."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.scripts import ROOT

OLD = ROOT / "tests/fixtures/version_0.1.0"
"""Run of eight steps on text.txt with weight averaging, its conversion, and a state after a prompt."""
PPL_AFTER_12_STEPS = 399.0830788031032
"""Validation perplexity of version 0.1.0 after it resumed the run to step 12."""
PPL_CONVERTED = {"parallel": 440.0548, "recurrent": 440.0549, "bfloat16 weights": 440.0929}
"""Perplexities that version 0.1.0 measured at the training length."""
LOGITS = (-0.5105, 2.1266, 0.2566, -0.3618)
"""Logits of the first tokens after "The cat", in Transformers."""


@pytest.fixture(autouse=True)
def old_run() -> Path:
    """Copy the old files into the folder of the test."""
    shutil.copytree(OLD, Path.cwd(), dirs_exist_ok=True)
    return Path("runs/old")


def test_old_run_resumes_to_the_same_perplexity(old_run: Path, script: Any) -> None:
    resumed = script("train", "--resume", "runs/old", "trainer.max_steps=12")
    assert resumed.code == 0, resumed.err
    with (old_run / "metrics.csv").open(encoding="utf-8") as file:
        last = [row for row in csv.DictReader(file) if row["val/ppl"]][-1]
    assert int(last["step"]) == 12
    for name in ("val/ppl", "val/ppl_recurrent"):
        assert float(last[name]) == pytest.approx(PPL_AFTER_12_STEPS, rel=1e-4)
    text = (old_run / "metrics.csv").read_text(encoding="utf-8")
    assert text.startswith((OLD / "runs/old/metrics.csv").read_text(encoding="utf-8").splitlines()[0])


def test_old_checkpoint_converts_to_the_same_perplexities(old_run: Path, script: Any) -> None:
    done = script("convert", "runs/old", "--force", "--verify")
    assert done.code == 0, done.out + done.err
    found = json.loads((old_run / "converted/conversion.json").read_text(encoding="utf-8"))["ppl"]
    for form, expected in PPL_CONVERTED.items():
        assert found[form]["32"] == pytest.approx(expected, rel=1e-5), form


def test_old_converted_model_continues_from_its_old_state(script: Any) -> None:
    words = ("--model", "runs/old/converted", "--temperature", "0", "--max-new-tokens", "8", "--json")
    on_top = script("generate", *words, "--load-state", "once.state", "--prompt", " more")
    assert on_top.code == 0, on_top.err
    assert json.loads(on_top.out)["new_tokens"] == 8


def test_old_converted_folder_loads_in_transformers_by_the_module_it_contains() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained("runs/old/converted", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained("runs/old/converted")
    with torch.no_grad():
        logits = model(**tokenizer("The cat", return_tensors="pt")).logits[0, -1, : len(LOGITS)]
    torch.testing.assert_close(logits, torch.tensor(LOGITS), rtol=0, atol=1e-3)
