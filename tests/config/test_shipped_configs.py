"""Shipped configurations pass a dry run with the figures stated in docs/reference/configurations.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bytes_moved import ByteCounter
from documentation import speed
from documentation.reference import settings_table
from documentation.speed import bytes_per_token, step_bytes
from gpu_checks.training import least_traffic
from tests.support.scripts import ROOT
from tnnlm.config.loader import load_config
from tnnlm.config.optim import OptimConfig
from tnnlm.config.schema import Config
from tnnlm.training.estimate import estimate_run, guessed_share
from tnnlm.training.flops import flops_per_token
from tnnlm.training.memory import estimate_memory

FILES = sorted((ROOT / "configs").glob("*.yaml"))
DOCS = (ROOT / "docs/reference/configurations.md").read_text(encoding="utf-8")


def table(after: str) -> list[list[str]]:
    """Return the rows of the first table after ``after``, without thousands separators."""
    lines = DOCS.partition(after)[2].splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    return [[cell.strip(" `").replace(",", "") for cell in row.strip("|").split("|")] for row in rows]


def flops(config: Config) -> float:
    """Return the FLOPs per token that the log of a run reports."""
    return flops_per_token(config.model, config.data.batch_size, guessed_share(config))


CLAIMED = {row[0]: row for row in table("memory per GPU") if row[1].isdigit()}
CARDS = {card.name: card for card in speed.CARDS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dry_run_matches_the_documentation(script: Any, path: Path) -> None:
    shown = script("train", "--config", str(path), "--dry-run", "--json", "trainer.accelerator=cuda")
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


def test_speed_on_paper_is_the_smaller_of_two_limits() -> None:
    rows = table("## Speed and cost")
    assert len(rows) == 2 * len(CLAIMED)
    for name, gpu, moved, products, memory, hours, gpu_hours, dollars in rows:
        card = CARDS[gpu]
        config = load_config(ROOT / f"configs/{name}.yaml")
        peak = card.float32 if config.trainer.precision == "32-true" else card.bf16
        assert float(products) == pytest.approx(peak / flops(config), rel=1e-3)
        assert float(memory) == pytest.approx(card.bandwidth / (float(moved) * 1e6), rel=0.01)
        total = int(CLAIMED[name][4]) / min(float(products), float(memory)) / 3600
        assert float(gpu_hours) == pytest.approx(total, abs=0.06)
        assert float(hours) == pytest.approx(total / int(CLAIMED[name][5]), abs=0.06)
        assert float(dollars) == pytest.approx(total * card.price, abs=1)
    for stated in ("312 TFLOP/s (A100) and 989 (H100)", "19.5 and 67", "2.04 TB/s and 3.35", "1.50 and 2.50"):
        assert stated in DOCS


def test_bytes_of_a_step_are_affine_in_the_layers_and_above_the_least_traffic() -> None:
    words = ["trainer.accelerator=cuda", "data.batch_size=2", "model.vocab_size=300", "model.n_layers=3"]
    config = load_config(ROOT / "configs/tnn_wt103_ours.yaml", words)
    forward, update = step_bytes(config, 3)
    tokens = 2 * config.model.max_length
    assert bytes_per_token(config) * tokens == pytest.approx(forward + update / config.trainer.accumulate)
    params = estimate_run(config).params
    # AdamW reads the weights, gradients and two moments and writes all but the gradients, in float32.
    assert update > 7 * 4 * params
    # Every product reads its weights in both passes.
    assert forward > least_traffic(estimate_memory(config), params) - 7 * 4 * params


def test_questions_about_a_tensor_move_no_bytes() -> None:
    """Fake tensors dispatch an operator for each question about their device."""
    with FakeTensorMode(), ByteCounter(distinct=False) as counter:
        a = torch.empty(5)
        assert a.device.type == "cpu"
        assert counter.total == 0
        _ = a + a
    assert counter.total == 3 * 5 * 4


def test_settings_page_states_the_values_that_are_used_without_a_file() -> None:
    demo = load_config(ROOT / "configs/demo.yaml")
    assert f"| `optim.lr` | number | `{OptimConfig().lr:g}` (demo: `{demo.optim.lr:g}`) |" in settings_table(
        "optim"
    )
    assert "`data.batch_size` | integer | `8` |" in settings_table("data")
    assert "demo" not in settings_table("kernel.rtf")
