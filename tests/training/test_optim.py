"""The learning-rate schedule and the weight-decay groups."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_config
from tests.support.scripts import assert_refused
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.config.loader import load_config
from tnnlm.config.optim import OptimConfig
from tnnlm.errors import ConfigError
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.loggers.csv import read_metrics
from tnnlm.training.memory import estimate_memory
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


def test_lr_factor_wsd_is_constant_and_then_linear() -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=10, min_lr_ratio=0.1, decay_share=0.2)
    assert [lr_factor(step, config, 100) for step in (9, 10, 50, 80)] == [1.0] * 4
    for step in range(80, 100):
        assert lr_factor(step, config, 100) == pytest.approx(1 - 0.9 * (step - 80) / 20)
    assert lr_factor(100, config, 100) == lr_factor(999, config, 100) == pytest.approx(0.1)
    # Before it decays, a shorter schedule is the beginning of a longer one.
    assert [lr_factor(n, config, 100) for n in range(80)] == [lr_factor(n, config, 300) for n in range(80)]
    late = OptimConfig(schedule="wsd", warmup_steps=90, decay_share=1)
    assert lr_factor(89, late, 100) == lr_factor(90, late, 100) == 1.0
    assert OptimConfig().decay_share == 0.1


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "inverse_sqrt", "constant"])
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
        (["optim.schedule=constant", "optim.schedule_steps=9"], "is for optim.schedule=cosine and wsd only"),
        (["optim.decay_share=0.2"], "optim.decay_share=0.2: is for optim.schedule=wsd only"),
        (["optim.decay_share=0", "optim.schedule=wsd"], "must be above 0"),
        (["optim.optimizer=muon", "trainer.strategy=fsdp"], "muon: not supported with trainer.strategy=fsdp"),
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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    model = CausalLM(tiny_config(final_norm="layer"))
    config = OptimConfig(optimizer="muon", lr=1e-2, weight_decay=0.3, kernel_lr_scale=0.5)
    optimizer = build_optimizer(model, config)
    first, *others = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        hidden = name.startswith("blocks.") and p.dim() == 2 and ".kernel." not in name
        assert hidden == (id(p) in {id(q) for q in first["params"]}), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)

    # The references: both optimizers by themselves on a copy.
    copied = CausalLM(tiny_config(final_norm="layer"))
    copied.load_state_dict(model.state_dict())
    twins = dict(copied.named_parameters())
    muon = torch.optim.Muon(
        [twins[names[id(p)]] for p in first["params"]],
        lr=1e-2,
        weight_decay=0.3,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {
                "params": [twins[names[id(p)]] for p in group["params"]],
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
            }
            for group in others
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    tokens = torch.randint(100, (2, 17))
    for _ in range(3):
        for found, steps in ((model, (optimizer,)), (copied, (muon, adamw))):
            found.zero_grad()
            found.loss(tokens).backward()
            for part in steps:
                part.step()
    assert all(torch.equal(p, twins[names[id(p)]]) for p in model.parameters())
    # A copy that is made from the state continues in the same way.
    again = build_optimizer(copied, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for found, part in ((model, optimizer), (copied, again)):
        found.zero_grad()
        found.loss(tokens).backward()
        part.step()
    assert all(torch.equal(p, twins[names[id(p)]]) for p in model.parameters())


def test_muon_is_refused_without_it(monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    refused = script("train", "optim.optimizer=muon", "--dry-run")
    assert_refused(refused, "optim.optimizer=muon: needs PyTorch 2.9 or newer", "optim.optimizer=adamw")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
@pytest.mark.usefixtures("_quiet")
def test_a_run_with_muon_and_wsd_resumes_exactly(script: Any) -> None:
    words = (
        "optim.optimizer=muon",
        "optim.schedule=wsd",
        "optim.warmup_steps=2",
        "optim.decay_share=0.4",
        "trainer.val_every_n_steps=20",
        "checkpoint.every_n_steps=3",
        "trainer.sample_tokens=0",
    )
    write_text()
    assert script("train", *SETTINGS, *words, "trainer.max_steps=10", "name=whole").code == 0
    shorter = ("trainer.max_steps=6", "optim.schedule_steps=10", "name=half")
    assert script("train", *SETTINGS, *words, *shorter).code == 0
    assert script("train", "--resume", "half", "trainer.max_steps=10").code == 0
    whole, half = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "half")
    )
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, half["state_dict"][name]), name
    rows = [read_metrics(Path(f"runs/{name}/metrics.csv")) for name in ("whole", "half")]
    rates = [[row["train/lr"] for row in found if row["train/lr"]] for found in rows]
    assert rates[0][-1] == rates[1][-1]
    changed = script("train", "--resume", "half", "trainer.max_steps=12", "optim.optimizer=adamw")
    assert_refused(changed, "optim.optimizer=adamw: can't be changed on resume")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
def test_muon_trains_matrices_alone() -> None:
    model = CausalLM(tiny_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.") and parameter.dim() == 2 and "kernel" not in name)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", lr=1e-2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randint(8, (2, 9))).sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
def test_muon_takes_the_memory_of_one_moment_less() -> None:
    sizes = ["trainer.accelerator=cpu", "trainer.precision=32-true", "model.n_layers=2", "data.batch_size=1"]
    adamw, muon = (
        estimate_memory(load_config(None, [*sizes, f"optim.optimizer={name}"])) for name in ("adamw", "muon")
    )
    model = CausalLM(load_config(None, sizes).model)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    hidden = optimizer.param_groups[0]["params"]
    # AdamW also counts the steps of each parameter, in one number.
    assert adamw.state - muon.state == 4 * sum(p.numel() for p in hidden) + 4 * len(hidden)


def test_build_scheduler_keeps_the_ratio_of_the_groups() -> None:
    optimizer = build_optimizer(CausalLM(tiny_config()), OptimConfig(kernel_lr_scale=0.5, warmup_steps=4))
    scheduler = build_scheduler(optimizer, OptimConfig(warmup_steps=4), 10)
    for _ in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[-1] == pytest.approx(0.5 * rates[0])
        optimizer.step()
        scheduler.step()
    assert torch.isfinite(torch.tensor(rates)).all()
