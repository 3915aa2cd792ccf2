"""Perplexities of a conversion: the parallel form, the recurrence, and other forms of the same model.

A form that this machine can't run, or that fails on the way, is named with the reason, and the others are
measured all the same.
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
"""perplexities are measured at these multiples of the training length, on so many tokens at the most;
at the training length that is what training validated on, unless there is very much of it"""
_BATCH_TOKENS = 4096


class Perplexities(NamedTuple):
    """Fields of a :class:`~tnnlm.checkpoints.certificate.ModelReport`."""

    ppl: dict[str, dict[str, float]]
    """by form, then by length in tokens"""
    not_measured: dict[str, str]
    """forms that can't be measured here, with the reason"""


def measure_perplexities(
    model: CausalLM, converted: CausalLM, corpus: PackedCorpus, config: Config
) -> Perplexities:
    """Perplexities of all forms on the validation split, in float32.

    Measured are the parallel form, the recurrence, the recurrence with weights in bfloat16 and int8, and
    ETSC and the window at the training length.

    Args:
        model: trained, in its parallel form.
        converted: its recurrent form.
        corpus: the run's text.
        config: of the run.
    """
    not_measured: dict[str, str] = {}
    forms = _forms(model, converted, not_measured)
    ppl: dict[str, dict[str, float]] = {name: {} for name in ("parallel", *forms)}
    for multiple, limit in LENGTHS.items():
        length = multiple * config.model.max_length
        rows = corpus.rows("val", length, config.data.max_val_tokens)
        if not len(rows):
            not_measured[f"context of {length:,} tokens"] = "the validation text is shorter"
            continue
        # Evenly spaced: the first documents alone are no sample of the text.
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), max(1, limit // length))).round().long()
        batches = chosen.split(max(1, _BATCH_TOKENS // length))
        scores: dict[str, list[NLL]] = {name: [] for name in ppl}
        for batch in tqdm(batches, desc=f"perplexity at {length}", leave=False, disable=None):
            tokens = torch.stack([rows[int(index)] for index in batch])
            scores["parallel"].append(parallel_nll(model, tokens))
            for name, form in list(forms.items()):
                with collect_failure(not_measured, name):
                    scores[name].append(recurrent_nll(form, tokens, config.conversion.chunk))
                if name in not_measured:
                    del forms[name]
        for name in ("parallel", *forms):
            ppl[name][str(length)] = add(scores[name]).ppl
    measured = {name: values for name, values in ppl.items() if name not in not_measured}
    return Perplexities(measured, not_measured)


def perplexity_cells(report: ModelReport) -> dict[str, list[str]]:
    """The perplexities as tables show them, with the gap to the parallel form: cells, a length each, by form.
    Empty where nothing was measured."""
    parallel = report.ppl.get("parallel")
    if not parallel:
        return {}
    return {
        form: [
            f"{value:.4f}" + ("" if form == "parallel" else f" ({ppl_gap(parallel[length], value):+.1e})")
            for length, value in values.items()
        ]
        for form, values in report.ppl.items()
    }


def _forms(model: CausalLM, converted: CausalLM, failures: dict[str, str]) -> dict[str, CausalLM]:
    """The forms that can be made here, by name; why others can't goes into ``failures``."""
    trained = model.config.max_length
    makers: dict[str, Callable[[], CausalLM]] = {"recurrent": lambda: converted}
    for dtype in ("bfloat16", "int8"):
        makers[f"{dtype} weights"] = partial(_packed, converted, dtype)
    for method in ("etsc", "window"):
        makers[f"{method} {trained}"] = partial(convert_model, model, method=method, horizon=trained)
    forms = {}
    for name, make in makers.items():
        with collect_failure(failures, name):
            forms[name] = make()
    return forms


def _packed(converted: CausalLM, dtype: str) -> CausalLM:
    return optimize_for_decoding(copy.deepcopy(converted), dtype)
