"""The experiment on ETSC: all conversion methods on the same taps, and the peak memory of a step."""

from __future__ import annotations

import pytest
import torch

from experiments import etsc
from experiments.etsc import convert_by_all
from experiments.taps import random_taps
from experiments.timing import clock_mean, interleaved, peak_allocated
from tnnlm.kernels import TNOConfig, TNOKernel


def test_every_method_is_measured_or_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etsc, "GRADIENT_TAPS", 1000)
    monkeypatch.setattr(etsc, "VANDERMONDE_LENGTH", 16)
    torch.manual_seed(0)
    kernel = TNOKernel(TNOConfig(rpe_dim=16, rpe_layers=2), 8)
    found = {}
    for n in (16, 64, 200):
        with torch.no_grad():
            found[n] = convert_by_all(kernel(n), kernel.decay, tiny=True)
        assert len(found[n]) == 7
    for n in (16, 64):
        assert found[n]["etsc"]["error"] <= 5e-6
        assert found[n]["window"]["error"] == 0
        assert found[n]["gradient"]["error"] > found[n]["etsc"]["error"]
        assert found[n]["balanced"]["seconds"] > 0
    assert found[16]["vandermonde, real"]["condition"] > 1
    assert found[64]["vandermonde, real"]["skipped"] == "n above 16"
    assert found[200]["gradient"]["skipped"] == "n d above 1,000"


def test_etsc_is_exact_on_random_taps() -> None:
    for n in (16, 64):
        k = random_taps(n, "noise").float()
        assert convert_by_all(k, torch.full((len(k),), 0.99), tiny=True)["etsc"]["error"] <= 5e-6


def test_peak_counts_tensors_alive_at_the_same_time() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000)

    assert 4000 <= peak_allocated(one_after_the_other) < 4200
    assert 12_000 <= peak_allocated(lambda: [torch.ones(1000) for _ in range(3)]) < 12_400


def test_cases_are_interleaved_and_the_first_calls_do_not_count() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}  # type: ignore[misc]
    seconds = interleaved(cases, 2, settle=1, steps=2)
    assert "".join(calls) == 3 * "aaabbb"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}
    assert clock_mean(cases["a"], 1e-6) > 0
