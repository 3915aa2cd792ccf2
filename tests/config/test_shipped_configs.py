"""Shipped configurations pass a dry run with the figures stated in docs/reference/configurations.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from documentation.reference import settings_table
from tests.support.scripts import ROOT
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config, OptimConfig
from tnnlm.training.estimate import guessed_share
from tnnlm.training.flops import flops_per_token

FILES = sorted((ROOT / "configs").glob("*.yaml"))
DOCS = (ROOT / "docs/reference/configurations.md").read_text(encoding="utf-8")
PEAKS = {"A100 80 GB": (312e12, 0.30, 1.5), "H100 80 GB": (989e12, 0.25, 2.5)}
"""Peak FLOP/s, utilisation and dollars per hour of each GPU, as the page states them."""


def table(after: str) -> list[list[str]]:
    """Return the rows of the first table after ``after``, without thousands separators."""
    lines = DOCS.partition(after)[2].splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    return [[cell.strip(" `").replace(",", "") for cell in row.strip("|").split("|")] for row in rows]


def flops(config: Config) -> float:
    """Return the FLOPs per token that the log of a run reports."""
    return flops_per_token(config.model, config.data.batch_size, guessed_share(config))


CLAIMED = {row[0]: row for row in table("memory per GPU") if len(row) == 8}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dry_run_matches_the_documentation(script: Any, path: Path) -> None:
    shown = script("train", "--config", str(path), "--dry-run", "--json")
    assert shown.code == 0
    plan = json.loads(shown.out)
    assert plan["config"]["name"] == path.stem or path.stem == "demo"
    if "demo" in path.stem:
        return
    _, params, per_update, steps, tokens, devices, memory, gflop = CLAIMED[path.stem]
    assert plan["params"] == int(params)
    assert plan["tokens_per_update"] == int(per_update)
    assert plan["config"]["trainer"]["max_steps"] == int(steps)
    assert plan["total_tokens"] == int(tokens)
    assert plan["devices"] == int(devices)
    assert plan["memory_bytes"] / 2**30 == pytest.approx(float(memory), abs=0.1)
    assert plan["memory_bytes"] < 80e9
    config = load_config(path)
    assert flops_per_token(
        config.model, config.data.batch_size, guessed_share(config)
    ) / 1e9 == pytest.approx(float(gflop), abs=1e-3)


def test_documented_configs_are_those_that_exist() -> None:
    assert set(CLAIMED) == {path.stem for path in FILES if "demo" not in path.stem}


def test_families_on_wikitext_differ_in_the_kernel_alone() -> None:
    configs = [load_config(ROOT / f"configs/{name}_wt103.yaml") for name in ("tnn", "sgconv", "rtf")]
    params = [int(CLAIMED[config.name][1]) for config in configs]
    assert max(params) / min(params) < 1.05
    for config in configs[1:]:
        assert (config.data, config.optim, config.trainer) == (
            configs[0].data,
            configs[0].optim,
            configs[0].trainer,
        )
        config.model.kernel = configs[0].model.kernel
        assert config.model == configs[0].model


def test_paper_figures_follow_from_the_stated_formula() -> None:
    rows = table("## Speed and cost")
    assert len(rows) == 2 * len(CLAIMED)
    for name, gpu, speed, hours, gpu_hours, dollars in rows:
        peak, utilisation, price = PEAKS[gpu]
        config = load_config(ROOT / f"configs/{name}.yaml")
        per_gpu = peak * utilisation / flops(config)
        total = int(CLAIMED[name][4]) / per_gpu / 3600
        assert float(speed) == pytest.approx(per_gpu, rel=1e-3)
        assert float(gpu_hours) == pytest.approx(total, abs=0.06)
        assert float(hours) == pytest.approx(total / int(CLAIMED[name][5]), abs=0.06)
        assert float(dollars) == pytest.approx(total * price, abs=1)
    for stated in ("312 TFLOP/s (A100) and 989 (H100)", "30 % and 25 %", "1.50 and 2.50 dollars"):
        assert stated in DOCS


def test_settings_page_states_the_values_that_are_used_without_a_file() -> None:
    demo = load_config(ROOT / "configs/demo.yaml")
    assert f"| `optim.lr` | number | `{OptimConfig().lr:g}` (demo: `{demo.optim.lr:g}`) |" in settings_table(
        "optim"
    )
    assert "`data.batch_size` | integer | `8` |" in settings_table("data")
    assert "demo" not in settings_table("kernel.rtf")
