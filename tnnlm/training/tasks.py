"""Validation of each task: how batches are scored and which metrics are logged.

A new task needs a model with ``loss(batch)`` in ``tnnlm.models.factory.MODELS``, its data in
``tnnlm.data.tasks.OPENERS`` and a class in ``VALIDATION_TASKS``.
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
from tnnlm.evaluation import (
    NLL,
    bits_per_byte,
    class_scores,
    masked_nll,
    parallel_nll,
    perplexity,
    ppl_gap,
    recurrent_nll,
)
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.models.batches import AnswerBatch, LabelledBatch, MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM, SequenceClassifier
from tnnlm.models.surgery import in_recurrent_form
from tnnlm.modules import RecurrentConv
from tnnlm.ops.context import ContextGroup
from tnnlm.training.context_parallel import own_rows, own_tokens
from tnnlm.training.conversions import SharedConversion
from tnnlm.training.fsdp import unsharded
from tnnlm.training.loggers.names import Place, columns_at, metrics_at


class WeightedMean(MeanMetric):
    """Mean over all batches of all ranks, weighted by their sizes, always in float64.

    NaN propagates: torchmetrics drops NaN batches by default, which would let a diverged model score well.
    """

    def __init__(self) -> None:
        super().__init__(nan_strategy=math.nan)
        self.set_dtype(torch.float64)

    def add(self, total: float, count: int) -> None:
        """Add a batch with sum ``total`` over ``count`` tokens or rows; ``count`` may be 0."""
        # Trainer.validate runs in inference mode, whose tensors can't be changed in place afterwards.
        self.mean_value, self.weight = self.mean_value.clone(), self.weight.clone()
        self.update(total / max(count, 1), count)

    def take(self) -> float:
        """Return the mean over all batches of all ranks, and reset the metric."""
        mean = float(self.compute())
        self.reset()
        return mean

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Any:
        # Otherwise the sums would be cast to the model's dtype, such as bfloat16. A move to another device
        # would also round later sums to float32.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device, torch.float64), exclude_state)


class ValidationTask(nn.Module, ABC):
    """Validation of one task. It is a module so that its metrics move to the model's device."""

    converts: ClassVar[bool] = False
    """Whether the models have a recurrent form, which is stored in checkpoints and generates the samples."""
    place: ClassVar[Place]
    """Group of metrics.csv columns that a validation logs."""
    monitor: ClassVar[str]
    """Metric that selects best.ckpt."""
    mode: ClassVar[str] = "min"
    """Whether the best value of ``monitor`` is the smallest (min) or the largest (max)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.group = ContextGroup()
        """Ranks that share sequences with this one; all of them validate the same batches."""

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the names of the metrics that a validation logs."""
        return columns_at(cls.place)

    @classmethod
    def shown(cls) -> tuple[str, ...]:
        """Return the metrics that are passed to the progress bar and callbacks."""
        metrics = metrics_at(cls.place)
        return tuple(metric.column for metric in metrics if metric.short or metric.column == cls.monitor)

    def begin(self, kernels: Sequence[Kernel | TwoSidedKernel]) -> None:
        """Prepare a validation; this may fail on a single rank.

        Args:
            kernels: Kernels of all layers, with unsharded weights.
        """

    def agree(self, strategy: Strategy) -> None:
        """Make all ranks validate the same way, after ``begin``."""

    def release(self) -> None:
        """Free what only validations, samples and checkpoints need; called before training continues."""

    @abstractmethod
    def validate(self, model: Any, batch: Any, counted: int | None) -> None:
        """Score the first ``counted`` rows of a batch, or all rows if it is None."""

    @abstractmethod
    def results(
        self, bytes_per_token: float | None, tokens_per_word: float | None = None
    ) -> dict[str, float]:
        """Return the values of :meth:`columns` over all batches of all ranks, and reset the metrics.

        Args:
            bytes_per_token: Bytes per token of the validation data; None omits bits per byte.
            tokens_per_word: Tokens per word of the validation data; None omits the perplexity per word.
        """


class CausalTask(ValidationTask):
    """Perplexity of the parallel and the recurrent form on the same tokens."""

    converts = True
    place = Place.CAUSAL
    monitor = "val/ppl"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.recurrences: list[RecurrentConv] = []
        """Converted kernels of this validation, in a plain list so that they are not submodules."""
        self.conversion = SharedConversion(config)
        """Conversion of the current weights, which the checkpoints of the same step store."""
        self.nll_parallel = WeightedMean()
        self.nll_recurrent = WeightedMean()

    def begin(self, kernels: Sequence[Kernel | TwoSidedKernel]) -> None:
        """Convert the kernels to recurrences."""
        self.recurrences = []
        causal = [kernel for kernel in kernels if isinstance(kernel, Kernel)]
        self.recurrences = [RecurrentConv(params) for params in self.conversion.of(causal).layers]

    def agree(self, strategy: Strategy) -> None:
        """Skip the recurrent form on all ranks if one rank failed to convert, to avoid a deadlock."""
        if not strategy.reduce_boolean_decision(bool(self.recurrences)):
            self.recurrences = []

    def release(self) -> None:
        """Free the recurrences, which would otherwise occupy the device until the next validation."""
        self.recurrences = []
        self.conversion.release()

    def validate(self, model: CausalLM, batch: Tensor | AnswerBatch, counted: int | None) -> None:
        """Score the same rows, or their answers, in parallel form (FFT) and in recurrent form.

        A context group shares the tokens of each row in parallel form, and the rows in recurrent form, whose
        state passes from token to token.
        """
        rows = batch.marked if isinstance(batch, AnswerBatch) else batch
        self.nll_parallel.add(*parallel_nll(model, own_tokens(rows, self.group), counted))
        rows, counted = own_rows(rows, counted, self.group)
        if self.recurrences:
            chunk = self.config.conversion.chunk
            with in_recurrent_form(model, self.recurrences):
                # A group of more ranks than rows leaves some without a row.
                nll = recurrent_nll(model, rows, chunk, counted) if len(rows) else NLL(0.0, 0)
            self.nll_recurrent.add(*nll)

    @contextmanager
    def recurrent_form(self, model: CausalLM) -> Iterator[CausalLM]:
        """Put the model in the recurrent form of this validation, unsharded, inside a ``with`` block.

        All ranks must enter the block. Inside, a single rank may run the model.
        """
        with unsharded(model), in_recurrent_form(model, self.recurrences):
            yield model

    def results(
        self, bytes_per_token: float | None, tokens_per_word: float | None = None
    ) -> dict[str, float]:
        """Reduce over all ranks, then exponentiate once."""
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
        if tokens_per_word is not None:
            values["val/ppl_word"] = perplexity(parallel * tokens_per_word)
        return values


class MaskedTask(ValidationTask):
    """Perplexity of the masked tokens."""

    place = Place.MASKED
    monitor = "val/ppl_masked"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.nll = WeightedMean()

    def validate(self, model: MaskedLM, batch: MaskedBatch, counted: int | None) -> None:
        """Score the masked tokens of a batch."""
        self.nll.add(*masked_nll(model, batch, counted))

    def results(
        self, bytes_per_token: float | None, tokens_per_word: float | None = None
    ) -> dict[str, float]:
        """Reduce over all ranks, then exponentiate once."""
        nll = self.nll.take()
        return {"val/loss": nll, "val/ppl_masked": perplexity(nll)}


class ClassifyTask(ValidationTask):
    """Accuracy of sequence classification."""

    place = Place.CLASSIFY
    monitor = "val/accuracy"
    mode = "max"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.nll = WeightedMean()
        self.correct = WeightedMean()

    def validate(self, model: SequenceClassifier, batch: LabelledBatch, counted: int | None) -> None:
        """Score the classes of a batch."""
        scores = class_scores(model, batch, counted)
        self.nll.add(scores.total, scores.rows)
        self.correct.add(scores.correct, scores.rows)

    def results(
        self, bytes_per_token: float | None, tokens_per_word: float | None = None
    ) -> dict[str, float]:
        """Reduce over all ranks."""
        return {"val/loss": self.nll.take(), "val/accuracy": self.correct.take()}


VALIDATION_TASKS: dict[str, type[ValidationTask]] = {
    "causal": CausalTask,
    "masked": MaskedTask,
    "classify": ClassifyTask,
}
"""Validation class for each value of ``config.task``."""
