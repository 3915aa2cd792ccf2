"""The learning-rate schedule and the weight-decay groups."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.models import tiny_config
from tnnlm.config.loader import load_config
from tnnlm.config.schema import OptimConfig
from tnnlm.errors import ConfigError
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.optim import build_optimizer, build_scheduler, lr_factor


def test_lr_factor_warms_up_linearly() -> None:
    config = OptimConfig(warmup_steps=10)
    assert [lr_factor(step, config, 100) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]


def test_lr_factor_cosine_ends_at_the_minimum() -> None:
    config = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    assert lr_factor(10, config, 110) == 1.0
    assert lr_factor(60, config, 110) == pytest.approx(0.55)
    assert lr_factor(110, config, 110) == pytest.approx(0.1)
    assert lr_factor(500, config, 110) == pytest.approx(0.1)


def test_lr_factor_inverse_sqrt_is_the_published_schedule() -> None:
    config = OptimConfig(schedule="inverse_sqrt", warmup_steps=4000)
    assert lr_factor(4000, config, 50_000) == 1.0
    assert lr_factor(16_000, config, 50_000) == pytest.approx(0.5)
    assert lr_factor(40_000, config, 50_000) == pytest.approx(math.sqrt(0.1))


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "constant"])
def test_lr_factor_without_warm_up_starts_at_the_peak(schedule: str) -> None:
    assert lr_factor(0, OptimConfig(schedule=schedule, warmup_steps=0), 10) == 1.0


def test_lr_factor_starts_the_warm_up_at_a_given_rate_as_fairseq_does() -> None:
    config = OptimConfig(schedule="inverse_sqrt", lr=5e-4, warmup_steps=4000, warmup_start_lr=1e-7)
    # fairseq: after n updates the rate is 1e-7 + n (5e-4 - 1e-7) / 4000.
    for step in (0, 1, 2500, 3999):
        expected = 1e-7 + step * (5e-4 - 1e-7) / 4000
        assert 5e-4 * lr_factor(step, config, 50_000) == pytest.approx(expected, rel=1e-12)
    assert lr_factor(4000, config, 50_000) == 1.0


def test_lr_factor_cosine_ends_at_schedule_steps() -> None:
    config = OptimConfig(warmup_steps=10, min_lr_ratio=0.1, schedule_steps=110)
    assert lr_factor(60, config, 1000) == pytest.approx(0.55)
    assert lr_factor(110, config, 1000) == lr_factor(999, config, 1000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.warmup_start_lr=0.1"], "optim.warmup_start_lr=0.1: must be at most optim.lr=0.002"),
        (["optim.schedule=constant", "optim.schedule_steps=9"], "is for optim.schedule=cosine only"),
        (["optim.schedule_steps=100"], "must be above optim.warmup_steps=100"),
    ],
)
def test_settings_of_the_schedule_that_contradict_each_other_are_refused(
    words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, words)


def test_build_optimizer_decays_every_parameter_if_asked() -> None:
    model = CausalLM(tiny_config(final_norm="layer"))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, decayed="all", kernel_lr_scale=0.5))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    # The same groups as without: a checkpoint loads into either.
    other = build_optimizer(model, OptimConfig())
    sizes = [[len(group["params"]) for group in found.param_groups] for found in (optimizer, other)]
    assert sizes[0] == sizes[1]


def test_build_optimizer_decays_matrices_outside_kernels_only() -> None:
    model = CausalLM(tiny_config())
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, kernel_lr_scale=0.5, lr=1e-3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        in_kernel = ".kernel." in name
        assert decay[id(parameter)] == (0.3 if parameter.dim() >= 2 and not in_kernel else 0.0), name
        assert rate[id(parameter)] == (5e-4 if in_kernel else 1e-3), name


def test_build_scheduler_keeps_the_ratio_of_the_groups() -> None:
    optimizer = build_optimizer(CausalLM(tiny_config()), OptimConfig(kernel_lr_scale=0.5, warmup_steps=4))
    scheduler = build_scheduler(optimizer, OptimConfig(warmup_steps=4), 10)
    for _ in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[-1] == pytest.approx(0.5 * rates[0])
        optimizer.step()
        scheduler.step()
    assert torch.isfinite(torch.tensor(rates)).all()
