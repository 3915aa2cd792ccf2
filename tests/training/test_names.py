"""Names that rich or matplotlib could take for markup are shown unchanged."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from plot_run import plot_runs, read_run
from tests.support.training_runs import tiny_run
from tnnlm.training.run import train
from tnnlm.training.summary import show_summary
from tnnlm.training.tasks import CausalTask, MaskedTask, ValidationTask

NAME = "x[1] [red]y[bold] :smile: $a_$"


@pytest.mark.parametrize("task", [CausalTask, MaskedTask])
def test_summary_shows_the_name_of_a_run(task: type[ValidationTask]) -> None:
    numbers = ("params", "params_frozen", "tokens_seen", "train_seconds", "tokens_per_second")
    summary = dict.fromkeys(numbers, 1)
    out = io.StringIO()
    show_summary(Path("runs") / NAME, summary, task, ":smile: [b]", Console(file=out, width=200))
    assert " ".join(out.getvalue().split()).startswith(f"run {NAME} ")
    assert f"in runs/{NAME}/: " in out.getvalue()


def test_run_of_any_name_is_trained_and_plotted(capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_run(f"name={NAME}", "trainer.max_steps=2"))
    assert f"runs/{NAME}: " in capsys.readouterr().out
    assert (Path("runs") / NAME / "loss.png").is_file()
    curves = read_run(Path("runs") / NAME)
    for several in ([curves], [curves, curves]):
        plot_runs(several, Path("runs.png"))
