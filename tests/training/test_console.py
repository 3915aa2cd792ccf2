"""Output of a run: progress in 80 columns, warnings, and a closing line with clearly defined figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import TaskID
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.models import FAMILIES
from tests.support.scripts import assert_refused
from tests.support.training_runs import SETTINGS, tiny_run
from tnnlm.config.loader import load_config
from tnnlm.data.prompts import sample_prompts
from tnnlm.models.batches import PADDING
from tnnlm.tokenizer import train_bpe
from tnnlm.training.callbacks.progress import TrainingBar
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.run import train

METRICS = {
    "train/loss": 10.12,
    "train/tokens_per_second": 123456.7,
    "train/grad_norm": 1.5,
    "val/bpb": 5.1,
}


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, "loss 10.12  val bpb 5.1"),
        (160, "loss 10.12  val bpb 5.1  tokens/s 123,457  norm 1.5"),
    ],
)
def test_the_progress_bar_fits_the_terminal(width: int, shown: str) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = TrainingBar(console)
    trainer: Any = SimpleNamespace(progress_bar_metrics=METRICS, global_step=1234, max_steps=2000)
    bar.bar.reset(TaskID(0), total=2000)
    bar.bar.update(TaskID(1), visible=True, total=10)
    bar.on_train_batch_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
    with console.capture() as captured:
        console.print(bar.bar)
    first, second = (line.rstrip() for line in captured.get().splitlines())
    assert first.endswith(f" {shown}")
    assert len(first) <= width
    assert second.startswith("validating")


def test_a_run_shorter_than_the_logging_interval_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_run("trainer.max_steps=2", "trainer.log_every_n_steps=50", "trainer.sample_tokens=0"))
    (row,) = (row for row in read_metrics(Path("runs/demo/metrics.csv")) if row["train/loss"])
    assert row["step"] == "2"
    assert json.loads(Path("runs/demo/summary.json").read_text())["train/loss"] == float(row["train/loss"])
    out = capsys.readouterr().out
    assert (
        "warning: optim.warmup_steps=100 is above trainer.max_steps=2; the learning rate only reaches 2% of "
        "optim.lr\n" in out
    )
    assert " s with validation, " in out
    assert " tokens/s without it (median)\n" in out


@pytest.mark.parametrize(
    ("family", "method", "warned"),
    [("tno", "etsc", False), ("sgconv", "etsc", True), ("sgconv", "window", False)],
)
def test_a_recurrence_that_ends_with_the_horizon_is_reported(
    family: str, method: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run("trainer.max_steps=1", "trainer.sample_tokens=0", f"conversion.method={method}")
    config.model.kernel = FAMILIES[family]()
    train(config)
    out = capsys.readouterr().out
    assert ("is exact below its horizon only, because the kernel sgconv has no decay" in out) is warned
    hint = "next: python convert.py runs/demo"
    assert f"{hint} && " in out if family == "tno" else f"{hint} --method auto && " in out


@pytest.mark.parametrize(
    ("text", "settings", "prompts"),
    [
        ("ACGT" * 15, (), ["ACGTACGTACGTACGTACGTACGT"]),
        ("Ein  erster\nSatz und mehr. ", (), ["Ein erster Satz"]),
        ("Unwahrscheinlich lange Zusammensetzungen ", (), ["Unwahrscheinlich lange"]),
        ("Ein erster Satz und mehr. ", ("trainer.sample_prompt='Es war '",), ["Es war ", "Ein erster Satz"]),
        ("\u4ece\u524d\uff0c" * 9, (), ["\u4ece\u524d\uff0c" * 8]),
        ("\x00\x01 ", (), []),
    ],
)
def test_the_prompts_of_a_run_are_words_of_its_text(
    text: str, settings: tuple[str, ...], prompts: list[str]
) -> None:
    words = [word for word in SETTINGS if not word.startswith("trainer.sample_prompt")]
    config = load_config(None, [*words, *settings])
    tokenizer = train_bpe([text], 300, "<|endoftext|>", 1, progress=False)
    row = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text), PADDING])
    data: Any = SimpleNamespace(tokenizer=tokenizer, val=[row])
    assert sample_prompts(config, data) == prompts
    config.data.format = "chat"
    assert sample_prompts(config, data) == []


def test_later_prompts_begin_with_whole_words_of_other_documents() -> None:
    texts = ["Anfang vom Ganzen ohne Ende", "rest. Der zweite Satz hier", "halb Neues Buch hier da"]
    tokenizer = train_bpe(texts, 300, "<|endoftext|>", 1, progress=False)
    third = [*tokenizer.encode("halb"), tokenizer.eos_id, *tokenizer.encode("Neues Buch hier da")]
    rows = [*(torch.tensor(tokenizer.encode(text)) for text in texts[:2]), torch.tensor(third)]
    data: Any = SimpleNamespace(tokenizer=tokenizer, val=rows)
    config = load_config(None, ["data.files=text.txt"])
    assert sample_prompts(config, data) == ["Anfang vom Ganzen", "Der zweite Satz", "Neues Buch hier"]


def test_a_sample_prompt_that_the_tokenizer_cannot_encode_does_not_end_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, **{letter: i for i, letter in enumerate("ACGT", 1)}}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save("dna.json")
    Path("text.txt").write_text("ACGT" * 1_500)
    train(tiny_run("trainer.max_steps=2", "data.tokenizer=dna.json", "data.eos_token=<eos>"))
    assert capsys.readouterr().out.count("warning: trainer.sample_prompt: ") == 1
    assert "--- step 2\n" in Path("runs/demo/samples.txt").read_text()


def test_a_warm_up_within_the_run_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_run("trainer.max_steps=2", "optim.warmup_steps=2", "trainer.sample_tokens=0"))
    assert "warning" not in capsys.readouterr().out


def test_dry_run_states_the_memory_of_a_small_model_and_that_it_reads_no_data(script: Any) -> None:
    done = script("train", *SETTINGS, "--dry-run")
    assert done.code == 0
    data, memory, state, step, validation, attached = done.out.splitlines()[-6:]
    assert memory.startswith("estimated memory: ")
    assert state.startswith("  weights, gradients and moments: ")
    assert step.startswith("  at most in an optimizer step: ")
    assert validation.startswith("  at most in a validation: ")
    assert "conversion.method=etsc, horizon " in attached
    assert attached.endswith("conversion.method=auto selects the smallest within conversion.tolerance")
    assert " MiB per device (1), " in memory
    assert int(memory.split()[2]) > 0
    assert data == "data: not read by --dry-run"
    assert not list(Path().iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("words", [(), ("--find-lr",)])
def test_a_missing_gpu_is_reported_before_the_data_is_read(script: Any, words: tuple[str, ...]) -> None:
    done = script("train", *SETTINGS, *words, "trainer.accelerator=cuda")  # there is no text.txt
    assert_refused(done, "trainer.accelerator=cuda: PyTorch finds no GPU; set trainer.accelerator=auto")
