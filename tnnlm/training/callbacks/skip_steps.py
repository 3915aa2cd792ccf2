"""Steps that would harm the model are left out: gradients that are not finite, losses that leap."""

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
from tnnlm.training.callbacks.checkpoint import CheckpointLast
from tnnlm.training.lit_module import LitModel

_MEMORY = 0.98
"""weight of the past in the running mean of the loss: about the last 50 steps"""


class SkipBadSteps(Callback):
    """Skips steps whose loss or gradient is not finite or whose loss leaps; stops after too many in a row.

    A skipped step counts as a step and takes its batch and its place in the learning rate's course;
    weights and the optimizer's moments stay as they were. All ranks skip the same steps: norm and
    loss are averaged over them, and one that is not finite makes the average so.

    The decision stays on the device, where the fused optimizer reads it. The count that stops the
    run comes to the host one step late on a GPU, so that nothing waits for it.
    """

    def __init__(self, settings: TrainerConfig, last: CheckpointLast) -> None:
        self.settings = settings
        self.last = last
        # Steps skipped in all, in a row up to now, and the running mean of the loss; 0 before the first.
        self._state = torch.zeros(3)
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._step = 0

    @property
    def state_key(self) -> str:
        """Of its state in a checkpoint, as in files of version 0.1.0."""
        return "Guard"

    def state_dict(self) -> dict[str, Any]:
        """What later decisions depend on."""
        skipped, in_row, mean = self._state.tolist()
        return {"skipped": int(skipped), "in_row": int(in_row), "mean_loss": mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        names = ("skipped", "in_row", "mean_loss")
        self._state = torch.tensor([float(state_dict[name]) for name in names])

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Move the counts to where the gradients are."""
        self._state = self._state.to(pl_module.device)
        self._step = trainer.global_step
        self._publish(pl_module)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Decide whether this step counts, before its gradient is clipped."""
        assert isinstance(pl_module, LitModel)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        measured = torch.stack([norm.float(), pl_module.step_loss().float()])
        norm, loss = trainer.strategy.reduce(measured, reduce_op="mean")
        skip = self._decide(norm, loss)
        if all(group.get("fused") for group in optimizer.param_groups):
            # What a gradient scaler would set: the fused kernels then change nothing.
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        elif skip:
            for parameter in parameters:
                parameter.grad = None
        self._publish(pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Stop the run after too many skipped steps in a row; the same on every rank."""
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
            reasons.append("loss or gradient was not finite")
        if self.settings.spike_factor:
            reasons.append(f"the loss was above {self.settings.spike_factor:g} times its running mean")
        return " or ".join(reasons)


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the CPU, and on a GPU the event after which it is there."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True), None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
