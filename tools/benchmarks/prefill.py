"""Limit of prefill: the matrix products of a converted model alone, packed by oneDNN, in the same chunks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import Product, model_products
from benchmarks.subjects import CHUNK
from experiments.timing import Stepper, Subject
from tnnlm.config.schema import ModelConfig

LIMIT = "matrix-products-alone"
"""Name of the subject."""


def products(dtype: str, shape: ModelConfig) -> Subject:
    """Return the products of all linear layers with random inputs of ``dtype``, and of the head at the end.

    Args:
        dtype: Dtype of weights and inputs, float32 or bfloat16.
        shape: Configuration of the model.
    """
    kind = getattr(torch, dtype)
    layers, head = model_products(shape, partial(_packed, dtype=kind))
    inputs = {width: torch.randn(CHUNK, width).to(kind) for width, _ in layers}
    last = torch.randn(1, shape.d_model).to(kind)

    def read(prompt: Tensor) -> None:
        for chunk in prompt.split(CHUNK, dim=1):
            for width, product in layers:
                product(inputs[width][: chunk.shape[1]])
        head(last)

    return Subject(LIMIT, dtype, 0, _no_steps, read, lambda context: 0)


def with_shares(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of prefill with ``product_share``: tokens per second relative to those of the products.

    Rows of other dtypes and names are unchanged.
    """
    limits = {
        (row["dtype"], row["context"]): row["tokens_per_second"] for row in rows if row["name"] == LIMIT
    }
    done = []
    for row in rows:
        limit = limits.get((row["dtype"], row["context"]))
        own = row["name"].startswith("tnnlm") and limit is not None
        done.append(row | {"product_share": row["tokens_per_second"] / limit} if own else row)
    return done


def _packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """Return the product with a matrix (O, I) in the layout that oneDNN chooses for it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), CHUNK)
    added = None if bias is None else bias.detach().to(dtype)
    return partial(_multiply, packed, added)


def _multiply(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return y


def _no_steps(batch: int, context: int) -> Stepper:
    raise NotImplementedError("the products are measured as a prefill only")
