"""Perplexities of a conversion: the parallel form, the recurrence, and further variants of the same model.

All variants are scored on the same tokens, so that differences are paired by row. If a variant can't run on
this machine, or fails, the reason is recorded and the others are still measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.config.schema import Config
from tnnlm.data.conversations.prepare import ConversationCorpus
from tnnlm.data.mixture import MixedCorpus
from tnnlm.data.packing import PackedCorpus
from tnnlm.deployment.token_budget import rows_in_time, rows_of_tokens, spread
from tnnlm.deployment.variants import Score, Scorer, Variant, parallel_score, variants_of
from tnnlm.errors import collect_failure
from tnnlm.evaluation import RowLosses, paired_gap
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import both_on

Corpus = PackedCorpus | MixedCorpus | ConversationCorpus
"""Data of a causal model."""
MULTIPLES = (1, 8)
"""Multiples of the training length at which perplexity is measured."""
INTERRUPTED = "the measurement was interrupted"
"""Reason that is stored until a perplexity is measured."""


class Perplexities(NamedTuple):
    """Measured perplexities, as fields of a :class:`~tnnlm.checkpoints.certificate.ModelReport`."""

    ppl: dict[str, dict[str, float]]
    """Perplexity by variant, then by length in tokens."""
    ppl_gap: dict[str, dict[str, float]]
    """Relative difference to the parallel form by variant, then by length in tokens."""
    ppl_gap_error: dict[str, dict[str, float | None]]
    """Standard error of that difference, paired by row; None for a single row."""
    ppl_tokens: dict[str, int]
    """Number of tokens that they are measured on, by length in tokens."""
    step_difference: dict[str, float]
    """Largest difference in nats per token between steps and taps on a sample, by variant."""
    not_measured: dict[str, str]
    """Variants that could not be measured on this machine, with the reason."""
    protocol: str
    """Text protocol of the validation split, ``data.protocol``."""


class Measurement:
    """Measurement of the perplexities of one conversion; what is found so far can be read at any time."""

    def __init__(self, corpus: Corpus, config: Config, device: torch.device | None) -> None:
        self._corpus = corpus
        self._most = config.data.max_val_tokens
        self._chunk = config.conversion.chunk
        self._device = device
        self._rows: dict[int, Tensor] = {}
        self._losses: dict[str, dict[int, RowLosses]] = {}
        self._differences: dict[str, float] = {}
        self._not_measured: dict[str, str] = {}
        self._pending: list[str] = []

    def found(self) -> Perplexities:
        """Return what is measured so far."""
        parallel = self._losses.get("parallel", {})
        gaps = {
            name: {str(length): paired_gap(parallel[length], own) for length, own in losses.items()}
            for name, losses in self._losses.items()
            if name != "parallel"
        }
        return Perplexities(
            {
                name: {str(length): own.nll.ppl for length, own in losses.items()}
                for name, losses in {"parallel": {}, "recurrent": {}, **self._losses}.items()
            },
            {name: {length: gap.gap for length, gap in own.items()} for name, own in gaps.items()},
            {name: {length: gap.standard_error for length, gap in own.items()} for name, own in gaps.items()},
            {str(length): own.nll.tokens for length, own in parallel.items()},
            dict(self._differences),
            self._not_measured | dict.fromkeys(self._pending, INTERRUPTED),
            self._corpus.report.protocol,
        )

    def run(self, model: CausalLM, converted: CausalLM, tokens: int | None) -> Iterator[str]:
        """Measure one variant after the other and yield the name of each.

        Args:
            model: Trained model, in its parallel form.
            converted: Converted model.
            tokens: Number of tokens at each length; None measures as many as take about half a minute.
        """
        variants = variants_of(model, converted)
        self._choose(model, converted, tokens, 1 + len(variants))
        if not self._rows:
            return
        work = sum(length * len(indices) for length, indices in self._rows.items()) * (1 + len(variants))
        with tqdm(total=work, unit=" tokens", unit_scale=True, leave=False, disable=None) as progress:
            self._losses["parallel"] = self._scores("parallel", partial(parallel_score, model), progress)
            self._pending = list(variants)
            yield "parallel"
            by_taps = True
            for name, variant in variants.items():
                with collect_failure(self._not_measured, name):
                    agreed = self._measure(name, variant, by_taps, progress)
                    by_taps = agreed if name == "recurrent" else by_taps
                self._pending.remove(name)
                yield name

    def _measure(self, name: str, variant: Variant, by_taps: bool, progress: tqdm[NoReturn]) -> bool:
        """Measure a variant, and return whether its steps agree with its taps."""
        # The variant is freed before the next one is made.
        scorer = Scorer(variant.make(), self._chunk, by_taps or not variant.same_recurrences)
        if not variant.same_recurrences:
            difference = scorer.compare(self._sample())
            if difference is not None:
                self._differences[name] = difference
        self._losses[name] = self._scores(name, scorer.at, progress)
        return scorer.by_taps

    def _scores(
        self, name: str, score_at: Callable[[int], Score], progress: tqdm[NoReturn]
    ) -> dict[int, RowLosses]:
        found = {}
        for length, indices in self._rows.items():
            score, parts = score_at(length), []
            progress.set_description(f"perplexity at {length}, {name}")
            for batch in indices.split(score.batch):
                parts.append(score.losses(self._read(length, batch)))
                progress.update(length * len(batch))
            found[length] = RowLosses.join(parts)
        return found

    def _choose(self, model: CausalLM, converted: CausalLM, tokens: int | None, variants: int) -> None:
        """Choose the rows of each length, by the number of tokens or by the time that they take."""
        available: dict[int, int] = {}
        for multiple in MULTIPLES:
            length = multiple * model.config.max_length
            if count := len(self._corpus.rows("val", length, self._most)):
                available[length] = count
            else:
                self._not_measured[f"context of {length:,} tokens"] = "the validation split is shorter"
        if tokens is not None:
            self._rows = rows_of_tokens(tokens, available)
            return

        scorer = Scorer(converted, self._chunk, by_taps=True)

        def seconds_per_row(length: int) -> float:
            seconds = self._time(parallel_score(model, length), length, available[length])
            with collect_failure({}, "recurrent"):  # reported when it is measured
                seconds = max(seconds, self._time(scorer.at(length), length, available[length]))
            return variants * seconds

        self._rows, omitted = rows_in_time(available, seconds_per_row)
        self._not_measured.update(omitted)

    def _time(self, score: Score, length: int, available: int) -> float:
        """Return the seconds per row of the first batch, after a warm-up with a single row."""
        rows = self._read(length, spread(min(available, score.batch), available))
        score.losses(rows[:1])
        started = time.perf_counter()
        score.losses(rows).nats.tolist()  # waits for a GPU
        return (time.perf_counter() - started) / len(rows)

    def _sample(self) -> Tensor:
        """Return the row (1, L + 1) on which steps and taps are compared, of up to two training lengths."""
        shortest, longest = min(self._rows), max(self._rows)
        return self._read(longest, self._rows[longest][:1])[:, : 2 * shortest + 1]

    def _read(self, length: int, indices: Tensor) -> Tensor:
        rows = self._corpus.rows("val", length, self._most)
        return torch.stack([rows[int(index)] for index in indices]).to(self._device)


def measure_perplexities(
    model: CausalLM,
    converted: CausalLM,
    corpus: Corpus,
    config: Config,
    device: torch.device | None = None,
    tokens: int | None = None,
    on_found: Callable[[Perplexities], None] = lambda found: None,
) -> Perplexities:
    """Measure the perplexity of all variants on the validation split, with autocast disabled.

    The variants are the parallel form, the recurrence, the recurrence with weights in bfloat16 and int8,
    and ETSC and the window with the training length as horizon. They are made and measured one after the
    other, and share the weights that they do not change.

    Args:
        model: Trained model, in its parallel form.
        converted: Converted model.
        corpus: Data of the run.
        config: Configuration of the run.
        device: Device to measure on; None measures where the models are.
        tokens: Number of tokens at each length, in evenly spaced rows; None measures as many as take about
            half a minute on this machine in all, at least 16 rows of each length.
        on_found: Called with what is measured so far after each variant.
    """
    if device is not None:
        model, converted = both_on(device, model, converted)
    measurement = Measurement(corpus, config, device)
    for _ in measurement.run(model, converted, tokens):
        on_found(measurement.found())
    return measurement.found()


def perplexity_cells(report: ModelReport) -> dict[str, list[str]]:
    """Return table cells by variant, one per length: the perplexity and its gap to the parallel form.

    The gap has its standard error. The result is empty if nothing was measured.
    """
    if not report.ppl.get("parallel"):
        return {}
    cells: dict[str, list[str]] = {}
    for name, values in report.ppl.items():
        gaps, errors = report.ppl_gap.get(name, {}), report.ppl_gap_error.get(name, {})
        if values:
            cells[name] = [f"{value:.4f}{_gap(gaps.get(at), errors.get(at))}" for at, value in values.items()]
    return cells


def _gap(gap: float | None, error: float | None) -> str:
    if gap is None:
        return ""
    return f" ({gap:+.1e})" if error is None else f" ({gap:+.1e}±{error:.0e})"
