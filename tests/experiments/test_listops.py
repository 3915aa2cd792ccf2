"""ListOps in the bidirectional experiment: every family learns more than symbol counts reveal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import listops
from experiments.frame import Record
from experiments.listops import KERNELS, LISTOPS, MODELS, BagOfSymbols, build, model_settings
from experiments.report import figure
from experiments.sizing import n_params
from tnnlm.data.sequences.listops import encode

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TNNLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return [cell | LISTOPS.measure(cell, ()) for cell in LISTOPS.grid("tiny")]


def test_every_model_learns_and_structure_helps(rows: list[Record]) -> None:
    accuracy = {row["model"]: row["accuracy"] for row in rows}
    assert tuple(accuracy) == MODELS
    assert min(accuracy.values()) > 2.5 * rows[0]["majority"]
    assert accuracy["tnn"] > accuracy["bag"]


def test_report(rows: list[Record], tmp_path: Path) -> None:
    claims = {claim.claim: claim for claim in LISTOPS.claims(rows)}
    assert len(claims) == 4
    reached = claims["the families reach the published accuracy on ListOps with 500 to 2,000 symbols"]
    assert not reached.holds
    assert "an easier task" in reached.ours
    (table,) = LISTOPS.tables(rows)
    for label in (*listops.LABELS.values(), "majority class"):
        assert f"| {label} |" in table.markdown()
    figure(LISTOPS.panels(rows), tmp_path / "listops.png")
    assert (tmp_path / "listops.png").stat().st_size > 5_000


def rows_with(longest: int = 1999, **percent: float) -> list[Record]:
    values = {"tnn": 61.0, "sgconv": 61.0, "rtf": 61.0, "transformer": 37.0, "bag": 35.0} | percent
    common: Record = {"majority": 0.17, "rows": 2000, "longest": longest, "max_depth": 10, "steps": 9}
    return [
        {"part": "listops", "model": name, "accuracy": value / 100, **common}
        for name, value in values.items()
    ]


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, [True, True, True, True]),
        ({"longest": 64}, [False, True, True, True]),
        ({"rtf": 58.0}, [False, True, True, True]),
        ({"rtf": 36.0}, [False, False, False, False]),
        ({"transformer": 62.0}, [True, True, True, False]),
        ({"bag": 59.0}, [True, False, True, True]),
    ],
)
def test_claims_follow_the_figures(changes: dict[str, Any], holds: list[bool]) -> None:
    assert [claim.holds for claim in LISTOPS.claims(rows_with(**changes))] == holds


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_cells_are_different_and_their_models_of_equal_size(size: str) -> None:
    cells = [json.dumps(cell, sort_keys=True) for cell in LISTOPS.grid(size)]
    assert len(set(cells)) == len(cells)
    params = {}
    for model in (*KERNELS, "transformer"):
        config = model_settings(model, size)
        with torch.device("meta"):
            built = build(model, config.model)
        params[model] = n_params(built) - getattr(built, "n_positions", 0)
        assert config.data == model_settings("tnn", size).data
    assert max(params.values()) / min(params.values()) < 1.06
    if size == "paper":
        assert config.data.listops.max_length == listops.PAPER_LENGTH
        assert (config.model.max_length, config.data.batch_size) == (2000, 128)
        assert (config.trainer.max_steps, config.optim.schedule_steps) == (30_000, 50_000)


def test_counts_are_all_that_the_bag_sees() -> None:
    bag = BagOfSymbols(15, 10)
    texts = ["[MAX 1 2 [MIN 3 4 ] ]", "[MIN 3 2 [MAX 4 1 ] ]"]
    tokens = torch.stack([torch.from_numpy(encode(text).astype("int64")) + 1 for text in texts])
    padded = torch.nn.functional.pad(tokens, (0, 3))
    lengths = torch.tensor([8, 8])
    assert torch.equal(bag(tokens, lengths)[0], bag(padded, lengths)[1])
