"""Learning-rate range test (Smith 2015, arXiv 1506.01186) with Lightning's Tuner: 100 steps at rising rates.

The trained weights are discarded. The tested rate is that of the first parameter group; the rate of the
kernels is this times ``optim.kernel_lr_scale``.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.tuner.tuning import Tuner
from rich.console import Console

from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.errors import DataError
from tnnlm.files import atomic_file
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.threads import limit_threads
from tnnlm.training.estimate import check_accelerator, estimate_run
from tnnlm.training.initial import InitialWeights
from tnnlm.training.lit_module import LitModel
from tnnlm.training.optim import build_optimizer
from tnnlm.training.quiet import quieten
from tnnlm.training.trainer import step_options

STEPS = 100
_SHOWN = 25
"""Number of steps between lines that report the progress."""
LOWEST, HIGHEST = 1e-6, 1.0
_DIVERGED = 4.0
"""The search stops when the loss exceeds this multiple of the best loss."""
_WINDOW = 9
"""Number of steps in the moving average of the loss."""


@dataclass(frozen=True)
class FoundRate:
    """Result of a learning-rate search."""

    rates: list[float]
    """Learning rates of the steps."""
    losses: list[float]
    """Training loss of each step, in nats per token."""
    smooth: list[float]
    """Moving average of ``losses``."""
    steepest: float
    """Learning rate at which the loss decreases fastest with the logarithm of the rate."""
    lowest: float
    """Learning rate with the lowest loss, an upper bound for the peak rate."""

    @property
    def suggestion(self) -> float:
        """Suggested peak rate: the geometric mean of ``steepest`` and ``lowest``.

        It is above ``steepest``, because warm-up allows a higher peak rate.
        """
        return math.sqrt(self.steepest * self.lowest)


class _Probe(LitModel):
    """LitModel that trains at the rates of the finder, without a schedule, logs or restored log state."""

    def configure_optimizers(self) -> Any:
        """Return the optimizer without its schedule.

        The finder sets the same rate for every group, so a hook before each step scales that of the kernels.
        """
        optimizer = build_optimizer(
            self.model, self.config.optim, self.config.trainer.precision != "16-mixed"
        )
        factors = [group["lr"] / self.config.optim.lr for group in optimizer.param_groups]

        def scale(*_: Any) -> None:
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] *= factor

        optimizer.register_step_pre_hook(scale)
        return optimizer

    def on_train_start(self) -> None:
        """Disable the progress bar of the finder, which has no option for it, where stderr is no terminal."""
        super().on_train_start()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _LRCallback) and not sys.stderr.isatty():
                callback.progress_bar_refresh_rate = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the losses of all batches; instead of logging, print the progress where there is no bar."""
        ends_step = (batch_idx + 1) % self.config.trainer.accumulate == 0
        if ends_step and self.global_step % _SHOWN == 0 and not sys.stderr.isatty():
            Console(stderr=True).print(
                f"learning-rate finder: step {self.global_step}/{STEPS}", highlight=False, soft_wrap=True
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the losses when the finder restores the initial weights at its end."""

    def losses(self) -> list[float]:
        """Return the loss of every optimizer step; Lightning's are running means over 50 of the 100 steps."""
        count = self.config.trainer.accumulate
        whole = torch.stack(self._losses[: len(self._losses) // count * count])
        return [float(loss) for loss in whole.view(-1, count).mean(1)]


def find_lr(config: Config, initial: InitialWeights | None = None) -> FoundRate:
    """Search the learning rate for a configuration, on one device with the global batch size of all devices.

    Args:
        config: The full configuration.
        initial: Weights that the training starts from; None takes random ones.

    Raises:
        UserError: If the input is invalid or the loss never decreases.
    """
    check_accelerator(config)
    config = copy.deepcopy(config)
    keep_large_blocks()
    limit_threads()
    devices = estimate_run(config).devices
    config.trainer.accumulate *= devices // config.trainer.context_parallel
    config.trainer.context_parallel = 1
    config.trainer.max_steps = STEPS
    config.trainer.strategy, config.trainer.devices, config.trainer.num_nodes = "auto", 1, 1
    lightning.seed_everything(config.seed, verbose=False)
    module, data = _Probe(config), TextDataModule(config)
    if initial is not None:
        initial.copy_to(module.model)
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
        # With the data module instead of its loader, Lightning would validate and convert at the end.
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
    """Find the rate at which the loss decreases fastest with log(rate), and the rate of the lowest loss.

    Lightning's suggestion differentiates by the rate instead of its logarithm. At the low end, where rates
    differ by 1e-7, noise in the loss then looks like the steepest descent.

    Args:
        rates: Learning rates in ascending order.
        losses: Loss of the step at each rate.

    Raises:
        DataError: If too few losses are finite, or the loss never decreases.
    """
    points = [(rate, loss) for rate, loss in zip(rates, losses, strict=False) if math.isfinite(loss)]
    if len(points) < 2 * _WINDOW:
        raise DataError("learning-rate finder: too few finite losses, training diverges in the first steps")
    tried, seen = (np.array(values) for values in zip(*points, strict=True))
    padded = np.pad(seen, _WINDOW // 2, mode="edge")
    smooth = np.convolve(padded, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
    best = int(smooth.argmin())
    slope = np.gradient(smooth, np.log(tried))[: best + 1]
    steepest = int(slope.argmin())
    if smooth[0] - smooth[best] < 0.01 * smooth[0]:
        raise DataError(
            "learning-rate finder: the loss decreases at no rate", "check the data and the sizes of the model"
        )
    return FoundRate(
        tried.tolist(), seen.tolist(), smooth.tolist(), float(tried[steepest]), float(tried[best])
    )


def plot_rates(found: FoundRate, path: Path) -> None:
    """Plot loss against learning rate, with the suggested rate, to a PNG file."""
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
