"""The LightningModule for every task: loss, optimizer, logging and validation.

It trains under any ``lightning.Trainer`` with batches from any loader. With ``TextDataModule`` it sends
metrics to the loggers directly, as :func:`tnnlm.training.run.train` needs; otherwise it uses ``self.log``.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from tnnlm.checkpoints.training import ENTRY, checkpoint_entry
from tnnlm.config.schema import Config
from tnnlm.errors import UserError
from tnnlm.models.batches import AnswerBatch
from tnnlm.ops.context import ContextGroup
from tnnlm.tokenizer import TextTokenizer
from tnnlm.training.agreement import mean_over_ranks
from tnnlm.training.batches import checked_batch, own_data, restart_epoch, schedule_steps, tokens_in
from tnnlm.training.context_parallel import join_group, own_tokens, split_convolutions
from tnnlm.training.estimate import tokens_per_update
from tnnlm.training.fsdp import (
    gather_kernels,
    gradient_sync,
    is_sharded,
    parameter_mesh,
    renumber_optimizer_state,
    shard,
)
from tnnlm.training.optim import build_optimizer, build_scheduler
from tnnlm.training.tasks import VALIDATION_TASKS
from tnnlm.training.throughput import Throughput, memory_values
from tnnlm.training.trainable import build_trainable


class LitModel(lightning.LightningModule):
    """LightningModule that trains the model of ``config.task``.

    Batches are the inputs of the model's ``loss``. For the task causal these are token ids (B, L + 1), inputs
    and targets in one tensor, or an :class:`~tnnlm.models.batches.AnswerBatch`, from any loader. ``config``
    sets sizes, optimizer, clipping and conversion; the trainer sets everything else. ``val/bpb`` is only
    logged with a :class:`~tnnlm.data.datamodule.TextDataModule`, because other loaders don't tell the bytes
    per token.
    """

    def __init__(self, config: Config, tokenizer: TextTokenizer | None = None) -> None:
        """Build the model.

        Args:
            config: The full configuration.
            tokenizer: Tokenizer of the data, if the data comes from a custom loader. Checkpoints store it, so
                that convert.py and ``tnnlm.load_trained`` can load them. Omit it with ``TextDataModule``,
                which provides one.
        """
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.model = build_trainable(config)
        self.task = VALIDATION_TASKS[config.task](config)
        self.watch = Throughput(config)
        self.group = ContextGroup()
        """Ranks that share sequences with this one (``trainer.context_parallel``)."""
        self._last_log = 0
        self._step = 0
        self._losses: list[Tensor] = []
        """Loss of each batch of the current optimizer step, on this rank."""
        self._step_losses: list[Tensor] = []
        """Mean loss of each optimizer step since the last log, on this rank."""
        self.skipped: Tensor | float = 0.0
        """Number of optimizer steps that :class:`SkipBadSteps` has skipped."""
        self._memory: dict[str, float] = {}
        self._tokens = 0
        """Number of tokens that this rank has processed since the last log."""

    def configure_model(self) -> None:
        """Compile, shard or split the model in place, so that checkpoint keys do not change."""
        self.model.recompute = self.config.trainer.recompute
        if self.config.trainer.compile:
            self.model.compile_blocks()
        if self._trainer is None:  # load_from_checkpoint calls this without a trainer
            return
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(self.model):
            # A compiled block doesn't run the hooks of a unit inside it.
            rounded = self.trainer.precision == "bf16-mixed" and not self.config.trainer.compile
            shard(self.model, parameter_mesh(self.trainer.strategy), rounded=rounded)
        if self.group.size != self.config.trainer.context_parallel:
            self.group = self.task.group = join_group(self.trainer, self.config)
            split_convolutions(self.model, self.group)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its learning-rate schedule, stepped once per optimizer step."""
        # Fused AdamW unscales gradients after clipping, which is wrong under 16-mixed only.
        fused = self.trainer.precision != "16-mixed"
        optimizer = build_optimizer(self.model, self.config.optim, fused)
        steps = schedule_steps(self.trainer, self.config)
        scheduler = build_scheduler(optimizer, self.config.optim, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients and keep their norm for the log.

        The limit is the trainer's ``gradient_clip_val``, or ``optim.grad_clip`` if the trainer has none. This
        replaces Lightning's clipping, which rejects fused optimizers under every mixed precision, bf16 too,
        though only 16-mixed scales gradients.
        """
        gradient_clip_val = gradient_clip_val or self.config.optim.grad_clip
        parameters = list(self.trainer.precision_plugin.main_params(optimizer))
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:  # SkipBadSteps removed them, and the norm of no tensors would be on the CPU
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        # With sharded gradients each rank holds a part of the norm.
        self.watch.norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_start(self) -> None:
        """Start the timers, and with ``TextDataModule`` a new pass over the rest of the data."""
        self._last_log, self._tokens, self._step = self.global_step, 0, self.global_step
        # Checkpoints are loaded before the model is moved to its device.
        self._step_losses = [loss.to(self.device) for loss in self._step_losses]
        if own_data(self.trainer) is not None:
            restart_epoch(self.trainer)
        elif self.config.task == "causal":
            rank_zero_info(
                "val/bpb: not logged, because only tnnlm.TextDataModule provides the bytes per token"
            )
        self.watch.start(self.global_step, self._waited())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout by (seed, step, micro-batch, rank), so that a resumed run gets the same masks.

        Recurrences are freed, because the checkpoint of the last step has been saved by now.
        """
        self.task.release()
        micro = batch_idx % self.trainer.accumulate_grad_batches
        gradient_sync(self.model, micro == self.trainer.accumulate_grad_batches - 1)
        torch.manual_seed(hash((self.config.seed, self.global_step, micro, self.global_rank)) % 2**63)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy in nats per predicted token (classify: per sequence)."""
        batch = self._checked(batch, batch_idx)
        if self.group.size > 1:
            batch = own_tokens(batch, self.group)
        loss: Tensor = self.model.loss(*batch if isinstance(batch, AnswerBatch) else (batch,))
        self._losses.append(loss.detach())
        self._tokens += tokens_in(batch)
        return loss

    def _checked(self, batch: Any, batch_idx: int) -> Any:
        if own_data(self.trainer) is not None:
            return batch
        return checked_batch(batch, self.config, first=batch_idx == 0)

    def step_loss(self) -> Tensor:
        """Return this rank's mean loss in the current step, which :class:`SkipBadSteps` checks."""
        return torch.stack(self._losses).mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the losses since the last log and renumber optimizer states for all strategies.

        The losses are means over all ranks, since every rank loads the same checkpoint. If the module has a
        tokenizer, the checkpoint also gets the entry that ``tnnlm.load_trained`` needs.
        """
        if self.tokenizer is not None and ENTRY not in checkpoint:
            checkpoint[ENTRY] = checkpoint_entry(self.config, self.tokenizer, None)
        checkpoint["losses_since_log"] = []
        if self._step_losses:
            losses = mean_over_ranks(torch.stack(self._step_losses))
            checkpoint["losses_since_log"] = losses.tolist()
        if not is_sharded(self.model):  # otherwise Lightning has renumbered them
            states = checkpoint.get("optimizer_states", ())
            for state, optimizer in zip(states, self.trainer.optimizers, strict=False):
                renumber_optimizer_state(state, optimizer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the losses since the last log."""
        losses = checkpoint.get("losses_since_log", [])
        self._step_losses = [torch.tensor(loss, device=self.device) for loss in losses]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the mean loss since the last log, the learning rate, throughput, gradient norm and memory."""
        step, own = self.global_step, own_data(self.trainer) is not None
        if not own:
            self._log_training()
        if step == self._step:  # the next batch belongs to the same optimizer step
            return
        self._step = step
        if own:
            self._step_losses.append(self.step_loss())
        self._losses = []
        last = step == self.trainer.max_steps  # also logged, as a short run would have no row otherwise
        if not own or (step % self.config.trainer.log_every_n_steps and not last):
            return
        values = {
            # Ranks have batches of equal size, so the mean of their means is the mean of the global batch.
            "train/loss": float(mean_over_ranks(torch.stack(self._step_losses).mean())),
            "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "train/skipped": float(self.skipped),
            **self.watch.read(self.trainer, self._tokens_per_step(step), self._waited()),
        }
        self._write(values, ("train/loss", "train/tokens_per_second", "train/grad_norm"))
        self._step_losses = []
        self._last_log = step

    def _tokens_per_step(self, step: int) -> int:
        """Return the mean number of tokens per optimizer step on all ranks since the last log."""
        tokens, self._tokens = self._tokens, 0
        if self.config.data.format == "text":
            return tokens_per_update(self.config, self.trainer.world_size)
        return tokens * self.trainer.world_size // (step - self._last_log)

    def _log_training(self) -> None:
        """Log without ``TextDataModule``: the loss of every batch, the rest every ``log_every_n_steps``."""
        self.log("train/loss", self._losses[-1], prog_bar=True)
        step = self.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._last_log or not every or step % every:
            return
        tokens = self._tokens * self.trainer.world_size // (step - self._last_log)
        values = self.watch.read(self.trainer, tokens, self._waited())
        self.log_dict({"train/lr": self.trainer.optimizers[0].param_groups[0]["lr"], **values})
        self._tokens, self._last_log = 0, step

    def on_validation_epoch_start(self) -> None:
        """Measure the memory of the kernels and convert them if the task needs that.

        If this fails, validation skips the recurrent form and the run continues.
        """
        found = gather_kernels(self.model)
        self._memory = {}
        try:
            length, tolerance = self.config.model.max_length, self.config.conversion.tolerance
            self._memory = memory_values(found, length, tolerance)
            self.task.begin(found)
        except Exception as error:  # no failure here may end the training
            warnings.warn(f"validation: the model could not be converted: {error}", stacklevel=2)
        self.task.agree(self.trainer.strategy)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score one batch by the task's metrics."""
        data = own_data(self.trainer)
        counted = None if data is None else data.val_counted(batch_idx)
        self.task.validate(self.model, self._checked(batch, batch_idx), counted)

    def on_validation_epoch_end(self) -> None:
        """Log the task's metrics and the memory of the kernels."""
        data = own_data(self.trainer)
        sizes = (None,) if data is None else (data.opened.bytes_per_token, data.opened.tokens_per_word)
        values = self.task.results(*sizes) | self._memory
        if data is not None:
            self._write(values, self.task.shown())
            return
        for name, value in values.items():
            shown = name in self.task.shown()
            self.log(name, self._on_device(value), prog_bar=shown, sync_dist=True)

    def on_validation_end(self) -> None:
        """Restart the timers, which exclude validation."""
        self._last_log, self._tokens = self.global_step, 0
        self.watch.start(self.global_step, self._waited())

    def _waited(self) -> float | None:
        """Return the seconds that the training has waited for batches; only our data module measures them."""
        data = own_data(self.trainer)
        return None if data is None else data.wait.seconds

    def _write(self, values: dict[str, float], shown: tuple[str, ...]) -> None:
        """Send ``values`` to the loggers at this optimizer step, and those ``shown`` to bar and callbacks.

        A value may be missing, such as the norm of gradients if every step since the last row was skipped.
        ``self.log`` would count batches since the process started, and log late after a resume.
        """
        for logger in self.loggers:
            logger.log_metrics(values, self.global_step)
        for name in filter(values.__contains__, shown):
            # Values are equal on all ranks already; sync_dist only avoids a warning of Lightning.
            value = self._on_device(values[name])
            self.log(name, value, prog_bar=True, logger=False, sync_dist=name.startswith("val/"))

    def _on_device(self, value: float) -> Tensor:
        """Return a value as a tensor that ranks can reduce: NCCL only takes tensors on GPUs."""
        # Apple's GPU has no float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.tensor(value, dtype=dtype, device=self.device)


def tokenizer_of(trainer: lightning.Trainer) -> TextTokenizer:
    """Return the tokenizer of the data that ``trainer`` trains on.

    Raises:
        UserError: If neither the data module nor the LightningModule has one.
    """
    data, module = own_data(trainer), trainer.lightning_module
    if data is not None:
        return data.opened.tokenizer
    if not isinstance(module, LitModel) or module.tokenizer is None:
        raise UserError(
            "LitModel: a callback needs the tokenizer, which only tnnlm.TextDataModule provides by itself",
            "pass one with LitModel(config, tokenizer)",
        )
    return module.tokenizer
