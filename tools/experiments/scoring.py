"""Perplexity of any form of a model on held-out text, by the length of the rows that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion import convert_model
from tnnlm.data.packing import PackedCorpus, PackedRows
from tnnlm.errors import DataError
from tnnlm.evaluation import NLL, add, bits_per_byte, parallel_nll, recurrent_nll
from tnnlm.models.causal_lm import CausalLM

PASS_TOKENS = 1 << 13
"""tokens in one pass of a model"""


def score(model: Any, rows: Tensor, chunk: int | None) -> NLL:
    """Score rows (B, L + 1), some at a time: in parallel, or recurrently in chunks of so many tokens."""
    device = next(model.parameters()).device
    parts = rows.to(device).split(max(1, PASS_TOKENS // (rows.shape[1] - 1)))
    if chunk is None:
        return add([parallel_nll(model, part) for part in parts])
    return add([recurrent_nll(model, part, chunk) for part in parts])


def spread(rows: PackedRows, tokens: int) -> Tensor:
    """Evenly spaced rows of about ``tokens`` together, one at the least: (B, L + 1)."""
    n = min(len(rows), max(1, tokens // rows.length))
    return torch.stack([rows[int(i)] for i in torch.linspace(0, len(rows) - 1, n).round().long()])


def held_out_bits(model: nn.Module, corpus: PackedCorpus, config: Config, tokens: int) -> float:
    """Bits per byte of the parallel form at the training length, over about so many held-out tokens."""
    rows = corpus.rows("val", config.model.max_length, config.data.max_val_tokens)
    nll = score(model.eval(), spread(rows, tokens), None)
    return bits_per_byte(nll.mean, corpus.val.bytes_per_token)


def recurrent_forms(model: CausalLM, recipe: ConversionConfig) -> dict[str, CausalLM]:
    """A trained model converted by its family's own settings, then by ``auto``, by method.

    Raises:
        UserError: if one of them can't be had.
    """
    auto = dataclasses.replace(recipe, method="auto")
    return {str(own.method): convert_model(model.eval(), own) for own in (recipe, auto)}


def perplexities(
    model: nn.Module,
    forms: Mapping[str, Any],
    corpus: PackedCorpus,
    config: Config,
    tokens: int,
    multiples: tuple[int, ...],
) -> tuple[int, dict[str, dict[str, float]]]:
    """Perplexity of all forms on the same held-out tokens, read in rows of every length.

    Args:
        model: in its parallel form.
        forms: by name, its recurrent ones.
        corpus: whose held-out text is read.
        config: of the model.
        tokens: how many, about; the same at every length.
        multiples: lengths in training lengths, of which the text may fill only the first.

    Returns:
        how many tokens were scored, and by form, ``parallel`` first, perplexity by length.

    Raises:
        DataError: if the held-out text doesn't fill a row of the training length.
    """
    trained = config.model.max_length
    multiples = tuple(m for m in multiples if len(corpus.rows("val", m * trained)))
    if not multiples:
        raise DataError(f"the held-out text doesn't fill one row of {trained} tokens: give more of it")
    spans = spread(corpus.rows("val", max(multiples) * trained), tokens)
    rows = {m * trained: spans.unfold(1, m * trained + 1, m * trained).flatten(0, 1) for m in multiples}
    found = {"parallel": {str(n): score(model.eval(), part, None).ppl for n, part in rows.items()}}
    for name, form in forms.items():
        found[name] = {str(n): score(form, part, config.conversion.chunk).ppl for n, part in rows.items()}
    return spans[:, 1:].numel(), found
