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
from tnnlm.models.surgery import attach, in_parallel_form, recurrences, shared_copy, with_fixed_taps

LARGE = 64
"""Order from which on a recurrence is evaluated as a convolution; smaller ones run as fast themselves."""
STEPS = 32
"""Number of tokens of the sample that are decoded one at a time."""
AGREEMENT = 1e-3
"""Largest difference in nats per token between steps and convolution; beyond it the recurrence is run."""

TAPS_BYTES = 1 << 31
"""Size of the taps of a model up to which they are held while it is evaluated."""
_BATCH_TOKENS = 4096
"""Tokens of a batch that are evaluated together."""


class Score(NamedTuple):
    """Evaluation of a model on rows of one length."""

    losses: Callable[[Tensor], RowLosses]
    """Function that returns the losses of rows of token ids (B, L + 1)."""
    batch: int
    """Number of rows to evaluate together."""


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
    """Evaluation of a converted model at any length, by its recurrence or by the taps of its recurrence.

    Args:
        converted: Converted model.
        chunk: Tokens per prefill of a recurrence.
        by_taps: Whether large recurrences may be evaluated by their taps.
    """

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
        """Return the evaluation of rows of ``length`` tokens."""
        if self.by_taps and _taps_bytes(self._converted, length) <= TAPS_BYTES:
            form = in_parallel_form(self._converted, length, LARGE)
            return Score(partial(parallel_losses, form), _rows(length))
        run = partial(recurrent_losses, self._converted, chunk=self._chunk)
        return Score(run, _rows(min(length, self._chunk)))


def parallel_score(model: CausalLM, length: int) -> Score:
    """Return the evaluation of a model in its parallel form on rows of ``length`` tokens."""
    form = with_fixed_taps(model, length) if _taps_bytes(model, length) <= TAPS_BYTES else model
    return Score(partial(parallel_losses, form), _rows(length))


def _taps_bytes(model: CausalLM, length: int) -> int:
    """Return the size in bytes of the taps of all layers in float32."""
    return 4 * model.config.n_layers * model.config.expand * model.config.d_model * length


def _rows(tokens: int) -> int:
    return max(1, _BATCH_TOKENS // tokens)


def _packed(converted: CausalLM, dtype: str) -> CausalLM:
    return optimize_for_decoding(shared_copy(converted), dtype)


def _converted_by(model: CausalLM, method: str, horizon: int) -> CausalLM:
    _, layers = convert_layers(model, ConversionConfig(method=method, horizon=horizon))
    return attach(model, [layer.params for layer in layers], shared=True)
