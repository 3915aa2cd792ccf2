"""The experiment on the frequency-domain TNN at a tiny size: the format of its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.frame import SIZES, Record
from experiments.results import reproduce
from experiments.ski import SKI, VARIANTS, config_of, family_of, tails
from experiments.ski_claims import SKI_TEXTS, reach
from tnnlm.models.causal_lm import CausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TNNLM_CACHE", str(out / "cache"))
        reproduce(SKI, "tiny", out, lambda cells: cells)
        yield out


def rows_of(folder: Path, **wanted: Any) -> list[Record]:
    cells = json.loads((folder / "ski.json").read_text())["cells"]
    rows = [json.loads(key) | measured for key, measured in cells.items()]
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


@pytest.mark.parametrize("norm", [False, True])
def test_kernels_of_smooth_networks_decay_and_kinked_ones_leave_a_tail(folder: Path, norm: bool) -> None:
    for activation in ("gelu", "silu", "relu"):
        of = {"kind": "decay", "norm": norm, "activation": activation}
        (cosine,), (angle,) = (rows_of(folder, input=given, **of) for given in ("cosine", "angle"))
        smooth = activation != "relu"
        assert (reach(cosine["tails"]) <= 128) == smooth
        assert angle["tails"]["128"] > 1e-5  # for every activation


def test_models_have_the_same_parameters_and_learn(folder: Path) -> None:
    rows = rows_of(folder, kind="train")
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert len({row["params"] for row in rows}) == 1
    assert all(row["curve"][-1][1] < row["curve"][0][1] for row in rows)
    assert all(0 < row["bits_per_byte"] < 8 for row in rows)


def test_finite_kernels_are_exact_in_a_window_and_not_past_the_horizon_by_etsc(folder: Path) -> None:
    for row in rows_of(folder, kind="train"):
        found = row["conversions"]
        assert max(map(abs, found["window"]["gaps"].values())) < 1e-5
        assert found["etsc"]["tap_error"] < 1e-4
        if row["variant"].startswith("fd"):
            assert found["window"]["horizon"] <= 33
        if row["variant"] == "fd relu, angle":  # a kernel with a slowly decaying tail, truncated
            assert found["etsc"]["l1_error"] > 0.5
        assert found["balanced 1e-2"]["tap_error"] <= 1.001e-2
        assert found["balanced 1e-2"]["state_bytes"] < found["window"]["state_bytes"]


def test_every_length_is_timed_for_all_alike(folder: Path) -> None:
    rows = rows_of(folder, kind="time")
    assert [row["length"] for row in rows] == SKI_TEXTS.sizes("tiny")["lengths"]
    for row in rows:
        for seconds in (*row["step_seconds"].values(), *row["kernel_seconds"].values()):
            assert len(seconds) == SKI_TEXTS.sizes("tiny")["turns"]
            assert min(seconds) > 0


def test_page_and_plot(folder: Path) -> None:
    page = (folder / "ski.md").read_text()
    for heading in ("## Quality", "## Speed", "## Decay", "## Conversion"):
        assert heading in page
    assert page.count("| fd relu, angle |") >= 6
    assert (folder / "ski.png").stat().st_size > 10_000


def test_tails_are_shares_of_the_norm_past_lag_0() -> None:
    k = torch.tensor([[9.0, 3.0, 0.0, 0.0, 4.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    assert tails(k) == pytest.approx({"1": 1.0, "2": 0.8, "4": 0.8})


def test_cells_are_all_different() -> None:
    for size in SIZES:
        cells = [json.dumps(cell, sort_keys=True) for cell in SKI.grid(size)]
        assert len(set(cells)) == len(cells)


def test_published_size_builds() -> None:
    assert config_of("paper", ("wiki.txt",)).data.files == ["wiki.txt"]
    for variant in VARIANTS:
        family = family_of(variant, config_of("paper"))
        assert family.params == 48_666_624  # as published
        with torch.device("meta"):
            assert CausalLM(family.config.model).n_params == family.params
