"""Experiments that train on text, at a tiny size: flat perplexity, rising perplexity, and equal sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.etsc import ETSC
from experiments.extrapolation import EXTRAPOLATION
from experiments.families import families
from experiments.frame import CONFIGS, Claim, Experiment
from experiments.results import reproduce
from experiments.sizing import text_models
from tests.support.training_runs import write_text
from tnnlm.errors import UserError

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _text() -> None:
    text_models.cache_clear()  # clears the data of the test before, which had another cache
    write_text()


def run(experiment: Experiment) -> list[Claim]:
    return reproduce(experiment, "tiny", Path("out"), lambda cells: cells, data=("text.txt",))


def test_tnn_is_flat_where_rotary_positions_are_not() -> None:
    claims = run(EXTRAPOLATION)
    flat = [claim for claim in claims if "flat" in claim.claim]
    assert len(flat) == 3  # parallel, ETSC and auto
    assert all(claim.holds for claim in flat)
    assert all(claim.holds for claim in claims if "recurrent" in claim.claim)
    (rotary,) = (claim for claim in claims if "rotary" in claim.claim)
    assert rotary.holds
    rows = [
        json.loads(key) | row
        for key, row in json.loads(Path("out/extrapolation.json").read_text())["cells"].items()
    ]
    by_model = {row["model"]: row["ppl"] for row in rows}
    assert by_model["tnn"].keys() == {"parallel", "etsc", "auto"}
    assert list(by_model["tnn"]["parallel"]) == ["32", "64", "128", "224", "448", "896"]
    rise = {model: ppl["parallel"]["896"] / ppl["parallel"]["32"] - 1 for model, ppl in by_model.items()}
    assert rise["tnn"] <= 0.02 < rise["transformer"]
    page = Path("out/extrapolation.md").read_text()
    assert "Transformer with learned positions" in page
    assert Path("out/extrapolation.png").stat().st_size > 10_000


def test_families_are_equal_in_size_and_convolutions_in_quality() -> None:
    claims = run(families())
    assert claims[-1].holds  # equal parameters and tokens
    cells = json.loads(Path("out/families.json").read_text())["cells"]
    rows = {json.loads(key)["family"]: row for key, row in cells.items()}
    assert all(row["curve"][-1][1] < 0.95 * row["curve"][0][1] for row in rows.values())
    bits = [rows[name]["bits_per_byte"] for name in ("tnn", "sgconv", "rtf")]
    assert max(bits) < 1.1 * min(bits)
    assert "| SGConv | " in Path("out/families.md").read_text()
    assert Path("out/families.png").stat().st_size > 10_000


def test_etsc_is_exact_at_every_length_and_its_cost_flat() -> None:
    exact = [v for v in run(ETSC) if "the same before and after" in v.claim or "exact" in v.claim]
    assert len(exact) == 3
    assert all(claim.holds for claim in exact)
    found = json.loads(Path("out/etsc.json").read_text())["cells"]
    cells = [json.loads(key) | row for key, row in found.items()]
    converted = [row["methods"] for row in cells if row["part"] == "conversion"]
    assert all(row["etsc"]["error"] < 1e-2 * row["gradient"]["error"] for row in converted)
    short, long = (row for row in cells if row["part"] == "cost" and row["sweep"] == "length")
    for form in ("etsc, n = horizon", "balanced"):
        assert long["bytes"][form] == short["bytes"][form]
    for form in ("recompute", "cached history", "etsc, n = length"):
        assert long["bytes"][form] > 4 * short["bytes"][form]  # the sequence is eight times as long
    assert "| SGConv | ETSC, n = length | " in Path("out/etsc.md").read_text()
    assert Path("out/etsc.png").stat().st_size > 10_000


@pytest.mark.parametrize("experiment", [EXTRAPOLATION, families()])
def test_paper_size_is_the_published_training(experiment: Experiment) -> None:
    cells = experiment.grid("paper")
    assert all(cell["size"] == "paper" for cell in cells)
    assert {cell["steps"] for cell in cells} == {0}  # 0: the number of steps of the configuration
    assert (CONFIGS / "tnn_wt103.yaml").is_file()
    assert (CONFIGS / "sgconv_wt103.yaml").is_file()
    assert (CONFIGS / "rtf_wt103.yaml").is_file()


def test_a_family_that_cannot_be_built_stops_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.sizing.SIZE_TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"rtf: model\.glu_dim: no width"):
        text_models(("tnn", "rtf"), "tiny", 5, ("text.txt",))
