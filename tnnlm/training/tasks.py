"""What a run's task decides beside model and data: how a validation scores, and what it logs.

A task of its own is: a model with ``loss(batch)`` in ``encoder.MODELS``, its data in ``data.OPENERS``, and a
class here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from tnnlm.config.schema import Config
from tnnlm.conversion import convert_kernels
from tnnlm.evaluation import (
    bits_per_byte,
    class_scores,
    masked_nll,
    parallel_nll,
    perplexity,
    ppl_gap,
    recurrent_nll,
)
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.models.batches import LabelledBatch, MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM, SequenceClassifier
from tnnlm.models.surgery import in_recurrent_form
from tnnlm.modules import RecurrentConv
from tnnlm.training.fsdp import unsharded
from tnnlm.training.loggers.names import Place, columns_at, metrics_at


class WeightedMean(MeanMetric):
    """The mean over all batches of all ranks, each weighted by its size, always in float64.

    NaN stays NaN: by default torchmetrics drops such batches, and a model that diverged would score well.
    """

    def __init__(self) -> None:
        super().__init__(nan_strategy=math.nan)
        self.set_dtype(torch.float64)

    def add(self, total: float, count: int) -> None:
        """Add a batch: the sum over ``count`` tokens or rows, of which there may be none."""
        # A Trainer may begin in inference mode, whose tensors can't be changed in place outside of it.
        self.mean_value, self.weight = self.mean_value.clone(), self.weight.clone()
        self.update(total / max(count, 1), count)

    def take(self) -> float:
        """The mean over all batches of all ranks, of which it then starts anew."""
        mean = float(self.compute())
        self.reset()
        return mean

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Any:
        # Sums would follow a model to bfloat16, and any move rounds to float32 what is added from then on.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device, torch.float64), exclude_state)


class ValidationTask(nn.Module, ABC):
    """One task's validation. A module for its metrics' sake: they follow the model's device."""

    converts: ClassVar[bool] = False
    """whether its models have a recurrent form: checkpoints carry it, samples are written with it"""
    place: ClassVar[Place]
    """which columns of metrics.csv a validation logs"""
    monitor: ClassVar[str]
    """of these, what best.ckpt is the best in"""
    mode: ClassVar[str] = "min"
    """whether the best is the smallest or the largest: min or max"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """What a validation logs."""
        return columns_at(cls.place)

    @classmethod
    def shown(cls) -> tuple[str, ...]:
        """Of these, what the progress bar and callbacks get."""
        metrics = metrics_at(cls.place)
        return tuple(metric.column for metric in metrics if metric.short or metric.column == cls.monitor)

    def begin(self, kernels: Sequence[Kernel | TwoSidedKernel]) -> None:
        """Make ready for a validation; may fail on one rank alone.

        Args:
            kernels: of every layer, with whole weights.
        """

    def agree(self, strategy: Strategy) -> None:
        """Have all ranks do the same, after ``begin``."""

    @abstractmethod
    def validate(self, model: Any, batch: Any, counted: int | None) -> None:
        """Score one batch, of which the first ``counted`` rows count; None counts all."""

    @abstractmethod
    def results(self, bytes_per_token: float | None) -> dict[str, float]:
        """Values for :meth:`columns` over all batches of all ranks, then start anew.

        Args:
            bytes_per_token: of the text that was validated on; None leaves bits per byte out.
        """


class CausalTask(ValidationTask):
    """Perplexity of both forms on the same tokens."""

    converts = True
    place = Place.CAUSAL
    monitor = "val/ppl"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.recurrences: list[RecurrentConv] = []
        """of the kernels of this validation; in a list, so that they are no submodules"""
        self.nll_parallel = WeightedMean()
        self.nll_recurrent = WeightedMean()

    def begin(self, kernels: Sequence[Kernel | TwoSidedKernel]) -> None:
        """Convert them."""
        self.recurrences = []
        causal = [kernel for kernel in kernels if isinstance(kernel, Kernel)]
        _, layers = convert_kernels(causal, self.config.model.max_length, self.config.conversion)
        self.recurrences = [RecurrentConv(converted.params) for converted in layers]

    def agree(self, strategy: Strategy) -> None:
        """All ranks score the recurrence or none does: one that went on alone would wait for ever."""
        if not strategy.reduce_boolean_decision(bool(self.recurrences)):
            self.recurrences = []

    def validate(self, model: CausalLM, batch: Tensor, counted: int | None) -> None:
        """Score the same rows by FFT and by the recurrence."""
        self.nll_parallel.add(*parallel_nll(model, batch, counted))
        if self.recurrences:
            chunk = self.config.conversion.chunk
            with in_recurrent_form(model, self.recurrences):
                self.nll_recurrent.add(*recurrent_nll(model, batch, chunk, counted))

    @contextmanager
    def recurrent_form(self, model: CausalLM) -> Iterator[CausalLM]:
        """The model whole and in the recurrent form of this validation, for the length of a block, in
        which ranks may do different things. To be entered on all of them."""
        with unsharded(model), in_recurrent_form(model, self.recurrences):
            yield model

    def results(self, bytes_per_token: float | None) -> dict[str, float]:
        """Reduce over ranks, then exponentiate once."""
        parallel = self.nll_parallel.take()
        values = {"val/loss": parallel, "val/ppl": perplexity(parallel)}
        if bytes_per_token is not None:
            values["val/bpb"] = bits_per_byte(parallel, bytes_per_token)
        if self.recurrences:
            recurrent = self.nll_recurrent.take()
            values["val/ppl_recurrent"] = perplexity(recurrent)
            if bytes_per_token is not None:
                values["val/bpb_recurrent"] = bits_per_byte(recurrent, bytes_per_token)
            values["val/ppl_gap"] = ppl_gap(values["val/ppl"], values["val/ppl_recurrent"])
        return values


class MaskedTask(ValidationTask):
    """Perplexity of the hidden tokens."""

    place = Place.MASKED
    monitor = "val/ppl_masked"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.nll = WeightedMean()

    def validate(self, model: MaskedLM, batch: MaskedBatch, counted: int | None) -> None:
        """Score the tokens to be guessed."""
        self.nll.add(*masked_nll(model, batch, counted))

    def results(self, bytes_per_token: float | None) -> dict[str, float]:
        """Reduce over ranks, then exponentiate once."""
        nll = self.nll.take()
        return {"val/loss": nll, "val/ppl_masked": perplexity(nll)}


class ClassifyTask(ValidationTask):
    """Share of whole sequences whose class is found."""

    place = Place.CLASSIFY
    monitor = "val/accuracy"
    mode = "max"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.nll = WeightedMean()
        self.correct = WeightedMean()

    def validate(self, model: SequenceClassifier, batch: LabelledBatch, counted: int | None) -> None:
        """Classify a batch."""
        scores = class_scores(model, batch, counted)
        self.nll.add(scores.total, scores.rows)
        self.correct.add(scores.correct, scores.rows)

    def results(self, bytes_per_token: float | None) -> dict[str, float]:
        """Reduce over ranks."""
        return {"val/loss": self.nll.take(), "val/accuracy": self.correct.take()}


VALIDATION_TASKS: dict[str, type[ValidationTask]] = {
    "causal": CausalTask,
    "masked": MaskedTask,
    "classify": ClassifyTask,
}
"""by ``config.task``"""
