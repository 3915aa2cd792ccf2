"""What a run's task decides beside model and data: how a validation scores, and what it logs.

A task of its own is: a model with ``loss(batch)`` in ``encoder.MODELS``, its data in ``data.OPENERS``, and a
class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torchmetrics import Metric

from tnnlm.config.schema import Config
from tnnlm.conversion import convert_kernels
from tnnlm.evaluation import (
    NLL,
    Scores,
    bits_per_byte,
    class_scores,
    masked_nll,
    parallel_nll,
    ppl_gap,
    recurrent_nll,
)
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.models.batches import LabelledBatch, MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM, SequenceClassifier
from tnnlm.models.surgery import in_recurrent_form
from tnnlm.modules import RecurrentConv
from tnnlm.training.fsdp import whole


class NLLMetric(Metric):
    """Sums of nll and of tokens, reduced over ranks when computed: means of means are wrong on
    uneven ranks."""

    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: NLL) -> None:
        """Add a batch. Not in place: what an earlier ``trainer.validate`` left may be inference tensors."""
        self.total = self.total + nll.total
        self.tokens = self.tokens + nll.tokens

    def compute(self) -> NLL:
        """Over all batches of all ranks."""
        return NLL(float(self.total), int(self.tokens))


class ScoresMetric(Metric):
    """Sums over classified sequences, reduced over ranks as those of :class:`NLLMetric`."""

    total: Tensor
    correct: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in Scores._fields:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Scores) -> None:
        """Add a batch, not in place either."""
        self.total = self.total + scores.total
        self.correct = self.correct + scores.correct
        self.rows = self.rows + scores.rows

    def compute(self) -> Scores:
        """Over all batches of all ranks."""
        return Scores(float(self.total), int(self.correct), int(self.rows))


class Task(nn.Module, ABC):
    """One task's validation. A module for its metrics' sake: they follow the model's device."""

    converts: ClassVar[bool] = False
    """whether its models have a recurrent form: checkpoints carry it, samples are written with it"""
    columns: ClassVar[tuple[str, ...]]
    """what a validation logs"""
    shown: ClassVar[tuple[str, ...]]
    """of these, what the progress bar and callbacks get"""
    monitor: ClassVar[str]
    """of ``shown``, what best.ckpt is the best in"""
    mode: ClassVar[str] = "min"
    """whether the best is the smallest or the largest: min or max"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

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
        """Values for ``columns`` over all batches of all ranks, then start anew.

        Args:
            bytes_per_token: of the text that was validated on; None leaves bits per byte out.
        """


class CausalTask(Task):
    """Perplexity of both forms on the same tokens."""

    converts = True
    columns = ("val/loss", "val/ppl", "val/bpb", "val/ppl_recurrent", "val/bpb_recurrent", "val/ppl_gap")
    shown = ("val/ppl", "val/bpb")
    monitor = "val/ppl"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.recurrences: list[RecurrentConv] = []
        """of the kernels of this validation; in a list, so that they are no submodules"""
        self.nll_parallel = NLLMetric()
        self.nll_recurrent = NLLMetric()

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
        self.nll_parallel.update(parallel_nll(model, batch, counted))
        if self.recurrences:
            chunk = self.config.conversion.chunk
            with in_recurrent_form(model, self.recurrences):
                self.nll_recurrent.update(recurrent_nll(model, batch, chunk, counted))

    @contextmanager
    def recurrent_form(self, model: CausalLM) -> Iterator[CausalLM]:
        """The model whole and in the recurrent form of this validation, for the length of a block, in
        which ranks may do different things. To be entered on all of them."""
        with whole(model), in_recurrent_form(model, self.recurrences):
            yield model

    def results(self, bytes_per_token: float | None) -> dict[str, float]:
        """Reduce over ranks, then exponentiate once."""
        parallel = self.nll_parallel.compute()
        values = {"val/loss": parallel.mean, "val/ppl": parallel.ppl}
        if bytes_per_token is not None:
            values["val/bpb"] = bits_per_byte(parallel.mean, bytes_per_token)
        if self.recurrences:
            recurrent = self.nll_recurrent.compute()
            values["val/ppl_recurrent"] = recurrent.ppl
            if bytes_per_token is not None:
                values["val/bpb_recurrent"] = bits_per_byte(recurrent.mean, bytes_per_token)
            values["val/ppl_gap"] = ppl_gap(parallel.ppl, recurrent.ppl)
        self.nll_parallel.reset()
        self.nll_recurrent.reset()
        return values


class MaskedTask(Task):
    """Perplexity of the hidden tokens."""

    columns = ("val/loss", "val/ppl_masked")
    shown = ("val/ppl_masked",)
    monitor = "val/ppl_masked"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.nll = NLLMetric()

    def validate(self, model: MaskedLM, batch: MaskedBatch, counted: int | None) -> None:
        """Score the tokens to be guessed."""
        self.nll.update(masked_nll(model, batch, counted))

    def results(self, bytes_per_token: float | None) -> dict[str, float]:
        """Reduce over ranks, then exponentiate once."""
        nll = self.nll.compute()
        self.nll.reset()
        return {"val/loss": nll.mean, "val/ppl_masked": nll.ppl}


class ClassifyTask(Task):
    """Share of whole sequences whose class is found."""

    columns = ("val/loss", "val/accuracy")
    shown = ("val/accuracy",)
    monitor = "val/accuracy"
    mode = "max"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scores = ScoresMetric()

    def validate(self, model: SequenceClassifier, batch: LabelledBatch, counted: int | None) -> None:
        """Classify a batch."""
        self.scores.update(class_scores(model, batch, counted))

    def results(self, bytes_per_token: float | None) -> dict[str, float]:
        """Reduce over ranks, then divide once."""
        scores = self.scores.compute()
        self.scores.reset()
        return {"val/loss": scores.mean, "val/accuracy": scores.accuracy}


TASKS: dict[str, type[Task]] = {"causal": CausalTask, "masked": MaskedTask, "classify": ClassifyTask}
"""by ``config.task``"""
