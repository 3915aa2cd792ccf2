"""The learning-rate finder: a hundred steps at rising rates, by Lightning's own. Trains nothing that stays.

Smith 2015, arXiv 1506.01186. The rate of every step is that of the first group of parameters; kernels
keep their own factor over it, ``optim.kernel_lr_scale``.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.tuner.tuning import Tuner

from tnnlm.allocator import keep_large_blocks
from tnnlm.atomic import atomic_file
from tnnlm.config import Config
from tnnlm.data import TextDataModule
from tnnlm.errors import DataError
from tnnlm.training.lit_module import LitCausalLM
from tnnlm.training.plan import make_plan, resolve_precision

STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
_DIVERGED = 4.0
"""times the best loss: the search ends there"""
_SKIPPED = 10
"""points at the beginning that the running mean of the loss has not settled in"""


@dataclass(frozen=True)
class FoundRate:
    """What the search saw."""

    rates: list[float]
    losses: list[float]
    """running means, as many"""
    suggestion: float
    """where the loss falls fastest against the logarithm of the rate"""
    lowest: float
    """where it is lowest: the peak rate should stay below"""


class _Probe(LitCausalLM):
    """Trains at the rates that the finder sets, without schedule, log or checkpoint of ours."""

    def configure_optimizers(self) -> Any:
        """The optimizer alone; the finder overwrites the rate of every group with one and the same."""
        optimizer = super().configure_optimizers()["optimizer"]
        factors = [group["lr"] / self.config.optim.lr for group in optimizer.param_groups]
        # A schedule would be taken away, and its start has scaled the rates by now: no LambdaLR here.
        optimizer.register_step_pre_hook(lambda *_: _scale(optimizer, factors))
        return optimizer

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log nothing."""

    def losses(self, accumulate: int) -> list[float]:
        """Of every optimizer step. Lightning's own are running means over 50 steps: half of the search."""
        return [
            float(torch.stack(part).mean()) for part in zip(*[iter(self._losses)] * accumulate, strict=False)
        ]


def find_lr(config: Config) -> FoundRate:
    """Search the learning rate of a configuration, on one device with the global batch of all.

    Raises:
        UserError: for unusable input, or a loss that never falls.
    """
    config = copy.deepcopy(config)
    keep_large_blocks()
    devices = make_plan(config).devices
    config.trainer.accumulate *= devices
    config.trainer.max_steps = max(STEPS, 1)
    config.trainer.strategy, config.trainer.devices, config.trainer.num_nodes = "auto", 1, 1
    lightning.seed_everything(config.seed, verbose=False)
    module, data = _Probe(config), TextDataModule(config)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*have no `val_dataloader`.*", ".*LeafSpec.*"):
            warnings.filterwarnings("ignore", message=message)
        trainer = lightning.Trainer(
            accelerator=config.trainer.accelerator,
            devices=1,
            precision=resolve_precision(config),  # type: ignore[arg-type]
            max_steps=STEPS,
            accumulate_grad_batches=config.trainer.accumulate,
            gradient_clip_val=config.optim.grad_clip or None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=False,
            default_root_dir=folder,
        )
        data.trainer = trainer
        data.prepare_data()
        data.setup()
        # The loader alone: with the data module Lightning would validate, and convert, at the end.
        found = Tuner(trainer).lr_find(
            module,
            train_dataloaders=data.train_dataloader(),
            min_lr=LOWEST,
            max_lr=HIGHEST,
            num_training=STEPS,
            early_stop_threshold=_DIVERGED,
            update_attr=False,
        )
    assert found is not None
    return suggest(found.results["lr"], module.losses(config.trainer.accumulate))


def suggest(rates: list[float], losses: list[float]) -> FoundRate:
    """The rate at which the loss falls fastest against log(rate).

    Lightning's own suggestion divides by differences of the rates themselves: at the low end, where
    these are 1e-7, noise of the loss looks like the steepest fall.

    Raises:
        DataError: if the loss never falls.
    """
    points = [(r, x) for r, x in zip(rates, losses, strict=False) if math.isfinite(x)][_SKIPPED:]
    if len(points) < 3:
        raise DataError("too few finite losses to suggest a learning rate: the first steps diverge already")
    logs, kept = np.log([r for r, _ in points]), np.array([x for _, x in points])
    best = int(kept.argmin())
    slope = np.gradient(kept, logs)[: best + 1]
    steepest = int(slope.argmin())
    if slope[steepest] >= 0:
        raise DataError("the loss does not fall at any learning rate: look at the data and the model's sizes")
    return FoundRate(rates, losses, float(points[steepest][0]), float(points[best][0]))


def plot_rates(found: FoundRate, path: Path) -> None:
    """Draw loss against learning rate, with the suggestion."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    n = min(len(found.rates), len(found.losses))
    axis.semilogx(found.rates[:n], found.losses[:n], color="#08519c")
    for rate, colour, label in (
        (found.suggestion, "#31a354", "steepest fall"),
        (found.lowest, "#e6550d", "lowest loss"),
    ):
        axis.axvline(rate, color=colour, linestyle="--", label=f"{label}: {rate:.1e}")
    finite = [x for x in found.losses if math.isfinite(x)]
    axis.set_ylim(min(finite) - 0.2, min(max(finite), 2 * finite[0]) + 0.2)
    axis.set(xlabel="learning rate", ylabel="training loss, nats per token (running mean)")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _scale(optimizer: torch.optim.Optimizer, factors: list[float]) -> None:
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] *= factor
