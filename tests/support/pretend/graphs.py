"""CUDA graphs on a pretended GPU: the operators of a capture, which a replay runs on the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tests.support.pretend.tensors import LEDGER


class Graph:
    """CUDA graph. During its capture the host must not wait for the GPU, which the ledger checks."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Run the captured operators again; their results replace those of the capture."""
        LEDGER.launches["replayed graph"] += 1
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                again = func(*args, **kwargs)
                for before, after in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                    before.copy_(after)


@contextlib.contextmanager
def capture(graph: Graph, pool: Any = None) -> Iterator[None]:
    """Record the operators of the ``with`` block, which also run once; a GPU would only record them."""
    LEDGER.captured = graph.calls
    try:
        yield
    finally:
        LEDGER.captured = None


REPLACED: dict[str, Any] = {"CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: (0, 0)}
"""Replacements in ``torch.cuda``."""
