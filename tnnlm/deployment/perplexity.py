"""Perplexities of a conversion: the parallel form, the recurrence, and further variants of the same model.

If a variant can't run on this machine, or fails, the reason is recorded and the others are still measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.config.schema import Config
from tnnlm.conversion import convert_model
from tnnlm.data.packing import PackedCorpus
from tnnlm.errors import collect_failure
from tnnlm.evaluation import NLL, add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.models.causal_lm import CausalLM

LENGTHS = {1: 1 << 18, 8: 1 << 15}
"""Multiples of the training length at which perplexity is measured, with the largest number of tokens for
each. At the training length all tokens that training validates on are used, if they are not more."""
_BATCH_TOKENS = 4096


class Perplexities(NamedTuple):
    """Measured perplexities, as fields of a :class:`~tnnlm.checkpoints.certificate.ModelReport`."""

    ppl: dict[str, dict[str, float]]
    """Perplexity by variant, then by length in tokens."""
    not_measured: dict[str, str]
    """Variants that could not be measured on this machine, with the reason."""
    protocol: str
    """Text protocol of the validation split, ``data.protocol``."""


def measure_perplexities(
    model: CausalLM, converted: CausalLM, corpus: PackedCorpus, config: Config
) -> Perplexities:
    """Measure the perplexity of all variants on the validation split, with autocast disabled.

    The variants are the parallel form, the recurrence, the recurrence with weights in bfloat16 and int8,
    and ETSC and the window with the training length as horizon.

    Args:
        model: Trained model, in its parallel form.
        converted: Converted model.
        corpus: Data of the run.
        config: Configuration of the run.
    """
    not_measured: dict[str, str] = {}
    variants = _variants(model, converted, not_measured)
    ppl: dict[str, dict[str, float]] = {name: {} for name in ("parallel", *variants)}
    for multiple, limit in LENGTHS.items():
        length = multiple * config.model.max_length
        rows = corpus.rows("val", length, config.data.max_val_tokens)
        if not len(rows):
            not_measured[f"context of {length:,} tokens"] = "the validation split is shorter"
            continue
        # Rows are evenly spaced, because the first documents alone are not representative.
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), max(1, limit // length))).round().long()
        batches = chosen.split(max(1, _BATCH_TOKENS // length))
        scores: dict[str, list[NLL]] = {name: [] for name in ppl}
        for batch in tqdm(batches, desc=f"perplexity at {length}", leave=False, disable=None):
            tokens = torch.stack([rows[int(index)] for index in batch])
            scores["parallel"].append(parallel_nll(model, tokens))
            for name, variant in list(variants.items()):
                with collect_failure(not_measured, name):
                    scores[name].append(recurrent_nll(variant, tokens, config.conversion.chunk))
                if name in not_measured:
                    del variants[name]
        for name in ("parallel", *variants):
            ppl[name][str(length)] = add(scores[name]).ppl
    measured = {name: values for name, values in ppl.items() if name not in not_measured}
    return Perplexities(measured, not_measured, corpus.report.protocol)


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


def _variants(model: CausalLM, converted: CausalLM, failures: dict[str, str]) -> dict[str, CausalLM]:
    """Return the converted variants by name; reasons why others can't be made go into ``failures``."""
    trained = model.config.max_length
    makers: dict[str, Callable[[], CausalLM]] = {"recurrent": lambda: converted}
    for dtype in ("bfloat16", "int8"):
        makers[f"{dtype} weights"] = partial(_packed, converted, dtype)
    for method in ("etsc", "window"):
        makers[f"{method} {trained}"] = partial(convert_model, model, method=method, horizon=trained)
    variants = {}
    for name, make in makers.items():
        with collect_failure(failures, name):
            variants[name] = make()
    return variants


def _packed(converted: CausalLM, dtype: str) -> CausalLM:
    return optimize_for_decoding(copy.deepcopy(converted), dtype)
