"""Skipping of optimizer steps with loss spikes or with losses or gradients that are not finite."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from tnnlm.config.schema import TrainerConfig
from tnnlm.training.agreement import mean_over_ranks
from tnnlm.training.callbacks.checkpoint import CheckpointLast
from tnnlm.training.lit_module import LitModel

_MEMORY = 0.98
"""Decay of the running mean of the loss, which averages about the last 50 steps."""


class SkipBadSteps(Callback):
    """Callback that skips bad optimizer steps, and stops the run after too many in a row.

    A step is bad if its loss or gradient is not finite (``trainer.skip_nonfinite``) or its loss spikes
    (``trainer.spike_factor``). A skipped step consumes its batch and advances the learning-rate schedule, but
    does not change weights and optimizer states. All ranks skip the same steps, because gradient norm and
    loss are averaged over ranks; a value that is not finite makes the average not finite too.

    The decision stays on the device, where the fused optimizer uses it. On a GPU the count of skipped steps
    is copied to the host asynchronously and checked one step late, to avoid a synchronisation.
    """

    def __init__(self, settings: TrainerConfig, last: CheckpointLast) -> None:
        self.settings = settings
        self.last = last
        # Skipped steps in total and in a row, and the running mean of the loss (0 before the first step).
        self._state = torch.zeros(3)
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._step = 0

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints, unchanged since version 0.1.0."""
        return "Guard"

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the running mean of the loss."""
        skipped, in_row, mean = self._state.tolist()
        return {"skipped": int(skipped), "in_row": int(in_row), "mean_loss": mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts and the running mean of the loss."""
        names = ("skipped", "in_row", "mean_loss")
        self._state = torch.tensor([float(state_dict[name]) for name in names])

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Move the counts to the device of the gradients."""
        self._state = self._state.to(pl_module.device)
        self._step = trainer.global_step
        self._publish(pl_module)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Skip this step if it is bad, before its gradient is clipped."""
        assert isinstance(pl_module, LitModel)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        measured = torch.stack([norm.float(), pl_module.step_loss().float()])
        norm, loss = mean_over_ranks(measured)
        skip = self._decide(norm, loss)
        if all(group.get("fused") for group in optimizer.param_groups):
            # Fused optimizers do not update if found_inf is set, as a gradient scaler does.
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        elif skip:
            for parameter in parameters:
                parameter.grad = None
        self._publish(pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Stop the run on all ranks after too many skipped steps in a row."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._coming.append(_to_host(self._state))
        if self._state.is_cuda and len(self._coming) < 2:
            return
        counts, copied = self._coming.popleft()
        if copied is not None:
            copied.synchronize()
        if counts[1] >= self.settings.max_skipped:
            raise self.last.diverged(
                self._step, f"{int(counts[1])} steps in a row were skipped, because {self._reasons()}"
            )

    def _decide(self, norm: Tensor, loss: Tensor) -> Tensor:
        skipped, in_row, mean = self._state
        skip = torch.zeros_like(norm, dtype=torch.bool)
        if self.settings.skip_nonfinite:
            skip = ~(norm.isfinite() & loss.isfinite())
        if self.settings.spike_factor:
            skip = skip | ((mean > 0) & (loss > self.settings.spike_factor * mean))
        known = torch.where(mean > 0, _MEMORY * mean + (1 - _MEMORY) * loss, loss)
        self._state = torch.stack(
            [
                skipped + skip,
                torch.where(skip, in_row + 1, 0),
                torch.where(skip | ~loss.isfinite(), mean, known),
            ]
        )
        return skip

    def _publish(self, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, LitModel)
        pl_module.skipped = self._state[0]

    def _reasons(self) -> str:
        reasons = []
        if self.settings.skip_nonfinite:
            reasons.append("the loss or gradient was not finite")
        if self.settings.spike_factor:
            reasons.append(f"the loss was above {self.settings.spike_factor:g} times its running mean")
        return " or ".join(reasons)


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return a copy on the CPU, and for a GPU tensor the event that marks the copy as complete."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True), None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
