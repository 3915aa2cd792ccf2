"""Committed results of docs/results: every page renders from its JSON without a difference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from experiments.results import reproduce
from reproduce import EXPERIMENTS
from tests.support.scripts import ROOT

RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_page_and_plot_follow_from_the_committed_numbers(name: str, tmp_path: Path) -> None:
    shutil.copy(RESULTS / f"{name}.json", tmp_path)

    def nothing_left(cells: object) -> list[dict[str, object]]:
        assert cells == [], "docs/results lacks cells of this experiment"
        return []

    reproduce(EXPERIMENTS[name], "small", tmp_path, nothing_left)
    for kind in ("md", "json"):
        assert (tmp_path / f"{name}.{kind}").read_text() == (RESULTS / f"{name}.{kind}").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_index_follows_from_the_committed_numbers(tmp_path: Path) -> None:
    for name in EXPERIMENTS:
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    shutil.copy(RESULTS / "families.md", tmp_path)
    reproduce(EXPERIMENTS["families"], "small", tmp_path, lambda cells: cells)
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
