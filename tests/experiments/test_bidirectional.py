"""The bidirectional experiment at a tiny size: bidirectional kernels win, and its parts are independent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.frame import Record
from experiments.masked import (
    BIDIRECTIONAL,
    MODELS,
    build,
    held_out_rows,
    joined,
    masked_text,
    model_settings,
    perplexities,
)
from experiments.results import reproduce
from tnnlm.models.batches import MaskedBatch
from tnnlm.models.encoders import MaskedLM

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TNNLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        masked_text.cache_clear()
        out = tmp_path_factory.mktemp("results")
        reproduce(BIDIRECTIONAL, "tiny", out, lambda cells: cells)
        return out


@pytest.fixture
def rows(folder: Path) -> dict[str, Record]:
    """Return the records of the masked language models, by model."""
    cells = json.loads((folder / "bidirectional.json").read_text())["cells"]
    found = [json.loads(key) | value for key, value in cells.items()]
    return {row["model"]: row for row in found if row["part"] == "masked"}


def test_bidirectional_beats_causal_and_all_models_learn(rows: dict[str, Record]) -> None:
    assert list(rows) == list(MODELS)
    two_sided, causal, *berts = (rows[name]["ppl"]["32"] for name in MODELS)
    assert two_sided < 0.9 * causal
    assert max(two_sided, causal, *berts) < 150  # a uniform prediction has a perplexity of 300


def test_models_have_equal_parameters_and_training_tokens(rows: dict[str, Record]) -> None:
    params = [row["params"] for row in rows.values()]
    assert max(params) / min(params) < 1.03
    assert len({(row["tokens"], row["tokens_trained"]) for row in rows.values()}) == 1


def test_a_bidirectional_tnn_runs_at_lengths_it_was_not_trained_on(rows: dict[str, Record]) -> None:
    ppl = rows["two-sided"]["ppl"]
    assert list(ppl) == ["32", "64", "128"]
    assert ppl["128"] < 1.05 * ppl["32"]
    assert list(rows["bert"]["ppl"]) == ["32"]


def test_page_and_plot(folder: Path) -> None:
    page = (folder / "bidirectional.md").read_text()
    assert "| TNN, bidirectional | " in page
    assert "TNN paper" in page
    assert (folder / "bidirectional.png").stat().st_size > 10_000


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_cells_are_different_and_their_models_of_equal_size(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = BIDIRECTIONAL
    cells = [json.dumps(cell, sort_keys=True) for cell in experiment.grid(size)]
    assert len(set(cells)) == len(cells)
    monkeypatch.setattr("experiments.masked.load_task_data", lambda config: None)
    masked_text.cache_clear()
    config, _ = masked_text(size, ())
    params = []
    for model in MODELS:
        settings = model_settings(model, size, config)
        with torch.device("meta"):
            params.append(sum(p.numel() for p in build(model, settings.model).parameters()))
    masked_text.cache_clear()
    assert max(params) / min(params) < 1.03
    if size == "paper":  # published: 126.40 and 124.70 million
        assert params[0] == pytest.approx(126.4e6, rel=0.01)


def test_masked_tokens_are_the_same_at_every_length() -> None:
    batch = MaskedBatch(torch.arange(24).view(4, 6), torch.tensor([[1, 4]] * 4), torch.arange(8).view(4, 2))
    longer = joined(batch, 2)
    assert longer.positions.tolist() == [[1, 4, 7, 10]] * 2
    for one in (batch, longer):
        assert one.tokens.gather(1, one.positions).flatten().tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
        assert one.targets.flatten().tolist() == list(range(8))


def test_user_text_replaces_the_text_of_the_experiment(tmp_path: Path) -> None:
    text = tmp_path / "mine, author's.txt"
    text.write_text("\n".join(f"line {i} of a text of mine, {i * i}" for i in range(2000)))
    masked_text.cache_clear()
    config, data = masked_text("tiny", (str(text),))
    masked_text.cache_clear()
    assert config.data.files == [str(text)]
    held_out = held_out_rows(data, 256)
    assert held_out.tokens.shape == (8, 32)
    found: dict[str, Any] = perplexities(MaskedLM(config.model), "two-sided", held_out)
    assert list(found) == ["32", "64", "128"]
