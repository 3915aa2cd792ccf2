"""Evaluation by lm-evaluation-harness on a local task: results equal those of this package."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hf_folders import TEXT, Opened, own_logits
from tests.support.scripts import ROOT
from tnnlm.evaluation import recurrent_nll
from tnnlm.inference.sampling import SamplingParams

pytest.importorskip("lm_eval")
TASKS = Path(__file__).parent / "tasks"
TEXTS = (TEXT * 5, "The last words.")


def own_nll(opened: Opened, window: int, missing: bool = False) -> float:
    """Return the total negative log-likelihood of all documents in nats, computed by this package in the
    windows of the harness.

    Every document follows an end token. A window starts from an empty state, with only the token before its
    first target as context; the last window starts earlier, so that it is as long as the others. Ids without
    a token have a probability only if ``missing``.
    """
    total = 0.0
    for text in TEXTS:
        ids = [opened.own.tokenizer.eos_id, *opened.own.tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, window):
            targets = ids[start + 1 : start + 1 + window]
            first = max(0, start + len(targets) - window)
            row = torch.tensor([ids[first : start + 1 + len(targets)]])
            logits = opened.inner(row[:, :-1]).detach() if missing else own_logits(opened, row[:, :-1])
            scores = logits[0, -len(targets) :].log_softmax(-1)
            total -= float(scores.gather(1, row[0, -len(targets) :, None]).double().sum())
    return total


def n_bytes() -> int:
    return sum(len(text.encode()) for text in TEXTS)


def token_perplexity(opened: Opened, nats: float) -> float:
    return math.exp(nats / sum(len(opened.own.tokenizer.encode(text)) for text in TEXTS))


def write_texts(opened: Opened) -> None:
    """Write the data of both tasks; only the first document has the completion that the model generates."""
    record, pieces = opened.own.stream(opened.own.prefill(["The"]), 8, SamplingParams(temperature=0))
    written = "".join(pieces).split(",")[0]
    assert record.tokens
    rows = [
        {"text": text, "start": "The", "next": following}
        for text, following in zip(TEXTS, (written, "something else"), strict=True)
    ]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check_perplexities(opened: Opened, results: dict[str, Any], window: int) -> None:
    nats = math.log(results["byte_perplexity,none"]) * n_bytes()
    expected = own_nll(opened, window)
    assert token_perplexity(opened, nats) == pytest.approx(token_perplexity(opened, expected), rel=1e-3)
    assert results["bits_per_byte,none"] == pytest.approx(expected / n_bytes() / math.log(2), rel=1e-3)
    words = sum(len(text.split()) for text in TEXTS)
    assert results["word_perplexity,none"] == pytest.approx(math.exp(expected / words), rel=1e-2)


def test_harness_results_equal_those_of_this_package(balanced: Opened, tmp_path: Path) -> None:
    write_texts(balanced)
    window = balanced.model.config.n_ctx
    assert len(balanced.own.tokenizer.encode(TEXTS[0])) > 3 * window
    docs = (ROOT / "docs/how-to/use-with-transformers.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^lm_eval .*$", docs, flags=re.MULTILINE)
    # The documented command, with another folder and with tasks that need no network.
    words = shlex.split(line.replace("runs/demo/converted", str(balanced.folder)))
    words[words.index("--tasks") + 1] = "tnnlm_rolling,tnnlm_until"
    more = ("--include_path", str(TASKS), "--batch_size", "2", "--device", "cpu", "--output_path", "out")
    command = [sys.executable, "-m", *words, *more]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env={**os.environ, **offline, **path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = Path("out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    check_perplexities(balanced, results["tnnlm_rolling"], window)
    assert results["tnnlm_until"]["exact_match,none"] == 0.5


@pytest.mark.filterwarnings("default")
def test_whole_documents_are_one_window(balanced: Opened) -> None:
    """A larger ``max_length`` only raises the window of the harness, and no context is lost."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_texts(balanced)
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={balanced.folder},trust_remote_code=True,max_length=100000",
        tasks=["tnnlm_rolling"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=2,
        device="cpu",
    )
    assert found is not None
    check_perplexities(balanced, found["results"]["tnnlm_rolling"], 100_000)
    rows = [torch.tensor([[0, *balanced.own.tokenizer.encode(text)]]) for text in TEXTS]
    nats = sum(recurrent_nll(balanced.inner, row, 256).total for row in rows)
    # The project measures the model without its tokenizer.
    assert own_nll(balanced, 100_000, missing=True) == pytest.approx(nats, rel=1e-5)
    assert own_nll(balanced, balanced.model.config.n_ctx) != pytest.approx(nats, rel=1e-3)
