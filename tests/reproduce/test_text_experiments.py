"""Experiments that train on text, at a tiny size: what is flat, what rises, what is equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_runs import write_text

from tnnlm.errors import UserError
from tnnlm.reproduce.experiment import Experiment, Verdict
from tnnlm.reproduce.extrapolation import FLAT, Extrapolation
from tnnlm.reproduce.families import Families
from tnnlm.reproduce.run import reproduce
from tnnlm.reproduce.text_models import CONFIGS, text_models

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _text() -> None:
    text_models.cache_clear()  # every test has a cache of its own
    write_text()


def run(experiment: Experiment) -> list[Verdict]:
    experiment.data = ("text.txt",)
    return reproduce(experiment, "tiny", Path("out"), lambda cells: cells)


def test_tnn_is_flat_where_rotary_positions_are_not() -> None:
    verdicts = run(Extrapolation())
    flat = [verdict for verdict in verdicts if "flat" in verdict.claim]
    assert len(flat) == 3  # parallel, ETSC, auto
    assert all(verdict.holds for verdict in flat)
    assert all(verdict.holds for verdict in verdicts if "recurrent" in verdict.claim)
    (rotary,) = (verdict for verdict in verdicts if "rotary" in verdict.claim)
    assert rotary.holds
    rows = [
        json.loads(key) | row
        for key, row in json.loads(Path("out/extrapolation.json").read_text())["cells"].items()
    ]
    by_model = {row["model"]: row["ppl"] for row in rows}
    assert by_model["tnn"].keys() == {"parallel", "etsc", "auto"}
    assert list(by_model["tnn"]["parallel"]) == ["32", "64", "128", "224", "448", "896"]
    rise = {model: ppl["parallel"]["896"] / ppl["parallel"]["32"] - 1 for model, ppl in by_model.items()}
    assert rise["tnn"] <= FLAT < rise["transformer"]
    page = Path("out/extrapolation.md").read_text()
    assert "Transformer, learned positions" in page
    assert Path("out/extrapolation.png").stat().st_size > 10_000


def test_families_are_equal_in_size_and_convolutions_learn_faster() -> None:
    verdicts = run(Families())
    assert all(verdict.holds for verdict in verdicts if "at least as good" in verdict.claim)
    assert verdicts[-1].holds  # parameters and tokens
    rows = json.loads(Path("out/families.json").read_text())["cells"].values()
    assert all(row["curve"][-1][1] < row["curve"][0][1] for row in rows)
    assert "| SGConv | " in Path("out/families.md").read_text()
    assert Path("out/families.png").stat().st_size > 10_000


@pytest.mark.parametrize("experiment", [Extrapolation(), Families()])
def test_paper_size_is_the_published_training(experiment: Experiment) -> None:
    cells = experiment.cells("paper")
    assert all(cell["size"] == "paper" for cell in cells)
    assert {cell["steps"] for cell in cells} == {0}  # what the configuration says
    assert (CONFIGS / "tnn_wt103.yaml").is_file()
    assert (CONFIGS / "sgconv_wt103.yaml").is_file()
    assert (CONFIGS / "rtf_wt103.yaml").is_file()


def test_a_family_that_cannot_be_had_stops_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnnlm.families.SIZE_TOLERANCE", 0.0)
    with pytest.raises(UserError, match="no width"):
        text_models(("tnn", "rtf"), "tiny", 5, ("text.txt",))
