"""Perplexities of a conversion: the parallel form, the recurrence, and further variants of the same model.

If a variant can't run on this machine, or fails, the reason is recorded and the others are still measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion import convert_layers
from tnnlm.data.packing import PackedCorpus
from tnnlm.errors import collect_failure
from tnnlm.evaluation import NLL, add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, both_on, shared_copy

LENGTHS = {1: 1 << 18, 8: 1 << 15}
"""Multiples of the training length at which perplexity is measured, with the largest number of tokens for
each. At the training length all tokens that training validates on are used, if they are not more."""
_BATCH_TOKENS = 4096


class Perplexities(NamedTuple):
    """Measured perplexities, as fields of a :class:`~tnnlm.checkpoints.certificate.ModelReport`."""

    ppl: dict[str, dict[str, float]]
    """Perplexity by variant, then by length in tokens."""
    ppl_tokens: dict[str, int]
    """Number of tokens that they are measured on, by length in tokens."""
    not_measured: dict[str, str]
    """Variants that could not be measured on this machine, with the reason."""
    protocol: str
    """Text protocol of the validation split, ``data.protocol``."""


def measure_perplexities(
    model: CausalLM,
    converted: CausalLM,
    corpus: PackedCorpus,
    config: Config,
    device: torch.device | None = None,
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
    """
    if device is not None:
        model, converted = both_on(device, model, converted)
    not_measured: dict[str, str] = {}
    batches: dict[int, list[Tensor]] = {}
    for multiple, limit in LENGTHS.items():
        length = multiple * config.model.max_length
        rows = corpus.rows("val", length, config.data.max_val_tokens)
        if not len(rows):
            not_measured[f"context of {length:,} tokens"] = "the validation split is shorter"
            continue
        # Rows are evenly spaced, because the first documents alone are not representative.
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), max(1, limit // length))).round().long()
        batches[length] = list(chosen.split(max(1, _BATCH_TOKENS // length)))

    def scores(name: str, score: Callable[[Tensor], NLL]) -> dict[int, NLL]:
        found = {}
        for length, indices in batches.items():
            rows = corpus.rows("val", length, config.data.max_val_tokens)
            bar = tqdm(indices, desc=f"perplexity at {length}, {name}", leave=False, disable=None)
            read = (torch.stack([rows[int(index)] for index in batch]).to(device) for batch in bar)
            found[length] = add([score(tokens) for tokens in read])
        return found

    measured = {"parallel": scores("parallel", partial(parallel_nll, model))}
    for name, make in _variants(model, converted).items():
        with collect_failure(not_measured, name):
            # No variable holds the variant, so that it is freed before the next one is made.
            measured[name] = scores(name, partial(recurrent_nll, make(), chunk=config.conversion.chunk))
    ppl = {name: {str(length): nll.ppl for length, nll in found.items()} for name, found in measured.items()}
    tokens = {str(length): nll.tokens for length, nll in measured["parallel"].items()}
    return Perplexities(ppl, tokens, not_measured, corpus.report.protocol)


def perplexity_cells(report: ModelReport) -> dict[str, list[str]]:
    """Return table cells by variant, one per length: the perplexity and its gap to the parallel form.

    The result is empty if nothing was measured.
    """
    parallel = report.ppl.get("parallel")
    if not parallel:
        return {}
    return {
        name: [
            f"{value:.4f}" + ("" if name == "parallel" else f" ({ppl_gap(parallel[length], value):+.1e})")
            for length, value in values.items()
        ]
        for name, values in report.ppl.items()
    }


def _variants(model: CausalLM, converted: CausalLM) -> dict[str, Callable[[], CausalLM]]:
    """Return functions that make the converted variants, by name."""
    trained = model.config.max_length
    makers: dict[str, Callable[[], CausalLM]] = {"recurrent": lambda: converted}
    for dtype in ("bfloat16", "int8"):
        makers[f"{dtype} weights"] = partial(_packed, converted, dtype)
    for method in ("etsc", "window"):
        makers[f"{method} {trained}"] = partial(_converted_by, model, method, trained)
    return makers


def _packed(converted: CausalLM, dtype: str) -> CausalLM:
    return optimize_for_decoding(shared_copy(converted), dtype)


def _converted_by(model: CausalLM, method: str, horizon: int) -> CausalLM:
    _, layers = convert_layers(model, ConversionConfig(method=method, horizon=horizon))
    return attach(model, [layer.params for layer in layers], shared=True)
