"""Variants of a converted model whose perplexities are measured, and how each of them is evaluated.

A large recurrence is evaluated as the convolution with its taps, which is the same function, and is checked
against its steps on a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers
from tnnlm.evaluation import RowLosses, parallel_losses, recurrent_losses, step_difference
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, in_parallel_form, recurrences, shared_copy

LARGE = 64
"""Order from which on a recurrence is evaluated as a convolution; smaller ones run as fast themselves."""
STEPS = 32
"""Number of tokens of the sample that are decoded one at a time."""
AGREEMENT = 1e-3
"""Largest difference in nats per token between steps and convolution; beyond it the recurrence is run."""

Score = Callable[[Tensor], RowLosses]
"""Function that returns the losses of rows of token ids (B, L + 1)."""


class Variant(NamedTuple):
    """Variant of a model in recurrent form."""

    make: Callable[[], CausalLM]
    """Function that returns the model, which shares the weights that it does not change."""
    same_recurrences: bool = False
    """Whether its recurrences are those of the first variant."""


def variants_of(model: CausalLM, converted: CausalLM) -> dict[str, Variant]:
    """Return the variants to measure by name: the conversion, with narrow weights, and exact conversions.

    Args:
        model: Trained model, in its parallel form.
        converted: Converted model.
    """
    trained = model.config.max_length
    found = {"recurrent": Variant(lambda: converted)}
    for dtype in ("bfloat16", "int8"):
        found[f"{dtype} weights"] = Variant(partial(_packed, converted, dtype), same_recurrences=True)
    for method in ("etsc", "window"):
        found[f"{method} {trained}"] = Variant(partial(_converted_by, model, method, trained))
    return found


class Scorer:
    """Evaluation of a converted model at any length, by its recurrence or by the taps of its recurrence."""

    def __init__(self, converted: CausalLM, chunk: int, by_taps: bool) -> None:
        self._converted = converted
        self._chunk = chunk
        self.by_taps = by_taps and any(params.order() >= LARGE for params in recurrences(converted))

    def compare(self, row: Tensor) -> float | None:
        """Return the largest difference in nats per token between steps and taps on a row (1, L + 1).

        Beyond ``AGREEMENT``, the recurrence is run from now on. The result is None if it is run anyway.
        """
        if not self.by_taps:
            return None
        form = in_parallel_form(self._converted, row.shape[1] - 1, LARGE)
        difference = step_difference(form, self._converted, row, STEPS)
        self.by_taps = difference <= AGREEMENT
        return difference

    def at(self, length: int) -> Score:
        """Return the function that scores rows of ``length`` tokens."""
        if self.by_taps:
            return partial(parallel_losses, in_parallel_form(self._converted, length, LARGE))
        return partial(recurrent_losses, self._converted, chunk=self._chunk)


def _packed(converted: CausalLM, dtype: str) -> CausalLM:
    return optimize_for_decoding(shared_copy(converted), dtype)


def _converted_by(model: CausalLM, method: str, horizon: int) -> CausalLM:
    _, layers = convert_layers(model, ConversionConfig(method=method, horizon=horizon))
    return attach(model, [layer.params for layer in layers], shared=True)
