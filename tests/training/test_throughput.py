"""Monitoring: speeds, waits, norms, and the effective length and order of known kernels."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.training_runs import tiny_run
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import balanced
from tnnlm.data.sampler import GlobalOrderSampler
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.flops import flops_per_token
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.run import train
from tnnlm.training.throughput import LARGEST_ORDER, kernel_memory


def modes(radii: list[float], channels: int = 5, length: int = 512) -> torch.Tensor:
    """Return taps that are sums of real exponentials with random weights per channel."""
    lags = torch.arange(length, dtype=torch.float64)
    return torch.randn(channels, len(radii), dtype=torch.float64) @ torch.stack([r**lags for r in radii])


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.97])
def test_effective_length_of_an_exponential(radius: float) -> None:
    found = kernel_memory(modes([radius]), 1e-3)
    assert found is not None
    assert found.length == math.ceil(math.log(0.01) / (2 * math.log(radius)))
    assert found.order == 1


def test_effective_length_of_a_delay_is_the_lag_plus_one() -> None:
    k = torch.zeros(3, 64)
    k[:, 40] = 1
    found = kernel_memory(k, 1e-3)
    assert found is not None
    assert found.length == 41
    assert found.order == 41  # a delay of 40 needs exactly 41 states


def test_order_counts_modes_and_bounds_what_a_conversion_needs() -> None:
    k = modes([0.9, 0.5, -0.8, 0.97])
    found = kernel_memory(k, 1e-6)
    assert found is not None
    assert found.order == 4
    loose = kernel_memory(k, 1e-2)
    assert loose is not None
    assert loose.order <= balanced(k, tolerance=1e-4).order()
    noise = kernel_memory(torch.randn(200, 256), 1e-3)
    assert noise is not None
    assert noise.order == LARGEST_ORDER


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_unusable_taps_have_no_memory(value: float) -> None:
    assert kernel_memory(torch.full((2, 8), value), 1e-3) is None


def test_flops_are_six_per_weight_and_the_convolutions() -> None:
    config = ModelConfig()
    with torch.device("meta"):
        weights = sum(
            p.numel() for n, p in CausalLM(config).named_parameters() if p.dim() == 2 and "kernel" not in n
        )
    convolution = flops_per_token(config) - 6 * weights
    n, channels = 2 * config.max_length, config.n_layers * config.expand * config.d_model
    # Eight transforms of twice the length per row, and their products.
    assert convolution == pytest.approx(channels / config.max_length * (8 * 2.5 * n * math.log2(n) + 9 * n))
    assert flops_per_token(config, 64) < flops_per_token(config)


class Norms(Callback):
    """Callback that records the gradient norms of a separate computation, before clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: lightning.LightningModule, *args: Any) -> None:
        """Record the norm; Lightning clips after this hook."""
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))


@pytest.mark.parametrize("clip", ["0", "0.1"])
def test_run_logs_speeds_waits_and_norms(clip: str) -> None:
    seen = Norms()
    train(tiny_run("trainer.max_steps=10", f"optim.grad_clip={clip}"), extra_callbacks=[seen])
    run = Path("runs/demo")
    rows = read_metrics(run / "metrics.csv")
    logged = [row for row in rows if row["train/loss"]]
    assert [row["step"] for row in logged] == ["5", "10"]
    for row in logged:
        values = {key: float(value) for key, value in row.items() if value}
        assert values["train/tokens_per_second"] * values["train/step_seconds"] == pytest.approx(4 * 32)
        assert 0 < values["train/data_seconds"] < values["train/step_seconds"]
        assert values["train/memory_gib"] > 0.1
    assert float(logged[0]["train/grad_norm"]) == pytest.approx(sum(seen.norms[:5]) / 5, rel=1e-5)
    validated = [row for row in rows if row["val/ppl"]]
    for name in ("kernel/length", "kernel/order"):
        for layer in range(2):
            assert all(1 <= int(float(row[f"{name}/{layer}"])) <= 32 for row in validated)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert {"train/grad_norm", "train/data_seconds", "kernel/length/1", "kernel/order/0"} <= set(
        board.Tags()["scalars"]
    )
    text = board.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "The" in text
    assert text.strip("`\n") in (run / "samples.txt").read_text()


def test_data_wait_is_what_the_loader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = GlobalOrderSampler.__iter__

    def slow(self: GlobalOrderSampler) -> Any:
        for batch in fast(self):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(GlobalOrderSampler, "__iter__", slow)
    train(tiny_run("trainer.max_steps=10"))
    waits = [
        float(r["train/data_seconds"]) for r in read_metrics(Path("runs/demo/metrics.csv")) if r["train/loss"]
    ]
    assert all(0.05 <= wait <= 0.1 for wait in waits)


def test_a_line_of_a_batch_log_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_run("trainer.max_steps=8"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3  # one every 5 steps, the last step, and its validation
    assert all(len(line) < 120 for line in lines)
    assert "grad_norm" in lines[0]
    assert "effective length" in lines[2]
