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

from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.errors import DataError
from tnnlm.files import atomic_file
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.threads import limit_threads
from tnnlm.training.estimate import estimate_run
from tnnlm.training.lit_module import LitModel
from tnnlm.training.optim import build_optimizer
from tnnlm.training.run import quieten
from tnnlm.training.trainer import step_options

STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
_DIVERGED = 4.0
"""times the best loss: the search ends there"""
_WINDOW = 9
"""steps that a loss is averaged over"""


@dataclass(frozen=True)
class FoundRate:
    """What the search saw."""

    rates: list[float]
    losses: list[float]
    """of the step at each"""
    smooth: list[float]
    """averaged over the steps around"""
    steepest: float
    """where the loss falls fastest against the logarithm of the rate"""
    lowest: float
    """where it is lowest: the peak rate should stay below"""

    @property
    def suggestion(self) -> float:
        """The geometric mean of the two: a peak after a warm-up may lie above the steepest fall."""
        return math.sqrt(self.steepest * self.lowest)


class _Probe(LitModel):
    """Trains at the rates that the finder sets, without schedule, log or checkpoint of ours."""

    def configure_optimizers(self) -> Any:
        """The optimizer without its schedule. The finder gives every group the same rate: kernels'
        factor is put on it at each step."""
        optimizer = build_optimizer(
            self.model, self.config.optim, self.config.trainer.precision != "16-mixed"
        )
        factors = [group["lr"] / self.config.optim.lr for group in optimizer.param_groups]

        def scale(*_: Any) -> None:
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] *= factor

        optimizer.register_step_pre_hook(scale)
        return optimizer

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log nothing."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the losses: the finder puts the weights back when it is through."""

    def losses(self) -> list[float]:
        """Of every optimizer step. Lightning's own are running means over 50 steps: half of the search."""
        count = self.config.trainer.accumulate
        whole = torch.stack(self._losses[: len(self._losses) // count * count])
        return [float(loss) for loss in whole.view(-1, count).mean(1)]


def find_lr(config: Config) -> FoundRate:
    """Search the learning rate of a configuration, on one device with the global batch of all.

    Raises:
        UserError: for unusable input, or a loss that never falls.
    """
    config = copy.deepcopy(config)
    keep_large_blocks()
    limit_threads()
    devices = estimate_run(config).devices
    config.trainer.accumulate *= devices
    config.trainer.max_steps = STEPS
    config.trainer.strategy, config.trainer.devices, config.trainer.num_nodes = "auto", 1, 1
    lightning.seed_everything(config.seed, verbose=False)
    module, data = _Probe(config), TextDataModule(config)
    quieten()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
        trainer = lightning.Trainer(
            **step_options(config),
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
    return suggest(found.results["lr"], module.losses())


def suggest(rates: list[float], losses: list[float]) -> FoundRate:
    """Find where the loss falls fastest against log(rate), and where it is lowest.

    Lightning's own suggestion divides by differences of the rates themselves: at the low end, where
    these are 1e-7, noise of the loss looks like the steepest fall.

    Raises:
        DataError: if the loss never falls.
    """
    points = [(rate, loss) for rate, loss in zip(rates, losses, strict=False) if math.isfinite(loss)]
    if len(points) < 2 * _WINDOW:
        raise DataError("too few finite losses to suggest a learning rate: the first steps diverge already")
    tried, seen = (np.array(values) for values in zip(*points, strict=True))
    padded = np.pad(seen, _WINDOW // 2, mode="edge")
    smooth = np.convolve(padded, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
    best = int(smooth.argmin())
    slope = np.gradient(smooth, np.log(tried))[: best + 1]
    steepest = int(slope.argmin())
    if smooth[0] - smooth[best] < 0.01 * smooth[0]:
        raise DataError("the loss falls at no learning rate", "look at the data and the sizes of the model")
    return FoundRate(
        tried.tolist(), seen.tolist(), smooth.tolist(), float(tried[steepest]), float(tried[best])
    )


def plot_rates(found: FoundRate, path: Path) -> None:
    """Draw loss against learning rate, with the suggestion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.semilogx(found.rates, found.losses, color="#9ecae1", linewidth=1, label="loss of each step")
    axis.semilogx(found.rates, found.smooth, color="#08519c", label=f"mean of {_WINDOW} steps")
    for rate, colour, label in (
        (found.steepest, "#9e9ac8", "steepest fall"),
        (found.suggestion, "#31a354", "suggested"),
        (found.lowest, "#e6550d", "lowest loss"),
    ):
        axis.axvline(rate, color=colour, linestyle="--", label=f"{label}: {rate:.1e}")
    axis.set_ylim(min(found.losses) - 0.2, min(max(found.losses), 1.5 * found.losses[0]) + 0.2)
    axis.set(xlabel="learning rate", ylabel="training loss, nats per token")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
