"""Limits by the hardware: a model's matrix products alone, and their seconds by number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.report import table
from experiments.timing import interleaved, medians
from tnnlm.config.schema import ModelConfig
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.kernels import Kernel
from tnnlm.models.causal_lm import CausalLM

_TURNS = 7
Product = Callable[[Tensor], Tensor]
"""Product with a matrix and sum with a bias: (N, I) -> (N, O)."""


def model_products(
    shape: ModelConfig, make: Callable[[Tensor, Tensor | None], Product]
) -> tuple[list[tuple[int, Product]], Product]:
    """Return the matrix products of a converted model with random weights.

    Args:
        shape: Configuration of the model.
        make: Function (weight, bias) -> product.

    Returns:
        Input width and product of every linear layer, in order, and the product of the head.
    """
    torch.manual_seed(0)
    # A converted model has no kernels; those of this one are not multiplied.
    model = CausalLM(replace(shape, kernel=ModelConfig().kernel))
    unused = {
        id(part) for kernel in model.modules() if isinstance(kernel, Kernel) for part in kernel.modules()
    }
    layers = [
        (part.in_features, make(part.weight, part.bias))
        for part in model.modules()
        if isinstance(part, nn.Linear) and id(part) not in unused
    ]
    return layers, make(model.embedding.weight, None)


@torch.inference_mode()
def product_seconds(shape: ModelConfig, dtype: str, rows: Sequence[int]) -> dict[int, float]:
    """Measure all matrix products of a token, one after the other, with nothing between them.

    Args:
        shape: Configuration of the model.
        dtype: Dtype of the weights; the operator is the one of the packed engine.
        rows: Numbers of rows in a product.

    Returns:
        Median seconds of a pass over the linear layers and the head, by number of rows.
    """
    layers, head = model_products(shape, choose_linear(torch.device("cpu"), dtype).make)
    layers.append((shape.d_model, head))
    cases = {n: partial(_pass, [(torch.randn(n, width), layer) for width, layer in layers]) for n in rows}
    return medians(interleaved(cases, _TURNS, warm_up=2, settle=1, steps=3))


def _pass(work: Sequence[tuple[Tensor, Product]]) -> None:
    for x, product in work:
        product(x)


def limits_table(limits: Sequence[dict[str, Any]], unit: str) -> str:
    """Return a table of the tokens per second of the products alone, by dtype and number of rows.

    Args:
        limits: Rows with ``dtype``, ``rows`` and ``tokens_per_second``.
        unit: Word in front of the number of rows in the header of a column, such as ``batch``.
    """
    lines: dict[str, dict[str, str]] = {}
    for limit in limits:
        line = lines.setdefault(limit["dtype"], {"matrix products alone": limit["dtype"]})
        line[f"{unit} {limit['rows']:,}"] = f"{limit['tokens_per_second']:,.0f}"
    return table(list(lines.values()))
