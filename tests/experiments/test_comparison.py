"""The comparison of conversions says what the conversions' own tests show."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from conftest import tiny_config
from experiments.comparison import QUICK, Sizes, kernel_taps, random_taps, scaling
from experiments.comparison_models import orders, perplexity
from experiments.comparison_plots import plot, speed_up, tables
from tnnlm.data.packing import PackedRows
from tnnlm.models.causal_lm import CausalLM

SIZES = Sizes(
    lengths=(16, 64),
    channels=8,
    widths=(8, 100),
    width_length=64,
    order=8,
    gradient_steps=20,
    gradient_elements=1000,
    vandermonde_length=16,
    multiples=(1, 8),
    tokens=256,
    ppl_orders=(2, 8),
    orders=(4, 8),
)


@pytest.fixture
def model() -> CausalLM:
    return CausalLM(tiny_config()).eval()


def test_scaling_measures_every_method_and_says_what_it_left_out(model: CausalLM) -> None:
    rows = scaling(partial(kernel_taps, model), SIZES)
    assert len(rows) == 4 * 7
    errors = {(row["method"], row["sweep"], row["n"], row["d"]): row for row in rows}
    for n in (16, 64):
        assert errors["etsc", "length", n, 8]["error"] <= 5e-6
        assert errors["window", "length", n, 8]["error"] == 0
        assert errors["gradient", "length", n, 8]["error"] > errors["etsc", "length", n, 8]["error"]
    assert "condition" in errors["vandermonde, real", "length", 16, 8]
    assert "above 16" in errors["vandermonde, real", "length", 64, 8]["skipped"]
    assert "above 1,000" in errors["gradient", "width", 64, 100]["skipped"]
    factors = speed_up(rows)
    assert factors is not None
    assert 0 < factors[0] <= factors[1]


def test_scaling_runs_on_random_taps() -> None:
    rows = scaling(partial(random_taps, 8), SIZES)
    assert all(row["error"] <= 5e-6 for row in rows if row["method"] == "etsc")


def test_perplexity_shows_where_etsc_ends(model: CausalLM) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 2000).astype(np.int32)
    result = perplexity(model, lambda length: PackedRows(tokens, length), SIZES)
    assert set(result["contexts"]) == {32, 256}
    rows = {row["form"]: row for row in result["forms"]}
    assert rows["etsc, n = 32"]["error"] <= 5e-6
    assert rows["etsc, n = 32"]["error_past"] > 0.1
    assert rows["balanced, order 8"]["error_past"] < rows["etsc, n = 32"]["error_past"]
    assert abs(result["gap"]["etsc, n = 32"][32]) < 1e-5
    assert rows["balanced, order 8"]["state_bytes"] < rows["etsc, n = 32"]["state_bytes"]


def test_orders_never_beat_the_bound(model: CausalLM) -> None:
    result = orders(model, SIZES)
    assert len(result["rows"]) == 2 * 2
    assert all(row["ratio"] is None or row["ratio"] >= 0.99 for row in result["rows"])
    assert result["max_ratio"] >= result["median_ratio"]


def test_tables_and_pictures_are_made_of_every_part(model: CausalLM) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 2000).astype(np.int32)
    result = {
        "source": "a test",
        "about": "tiny",
        "notes": ["nothing"],
        "scaling": scaling(partial(kernel_taps, model), SIZES),
        "perplexity": perplexity(model, lambda length: PackedRows(tokens, length), SIZES),
        "order": orders(model, SIZES),
    }
    text = tables(result)
    for shown in ("etsc", "balanced", "window", "gradient", "vandermonde", "Note: nothing."):
        assert shown in text
    for path in plot(result, Path()):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert QUICK.layers == 2
