"""A decoding step as a CUDA graph: recorded once per number of rows, replayed with a single launch.

A step of a small model is hundreds of kernels of microseconds each, so that a GPU waits for their
launches. States go in and come out by copy: they may be forked and kept as with the plain model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tnnlm.models.causal_lm import CausalLM, ModelState

Recorder: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""given a function without arguments, returns one that does the same work on the same tensors"""
_WARM_UP = 3
_WORTH_IT = 4
"""steps of so many rows after which they are recorded: rows that end change their number all the time"""


def cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Record ``run`` on the current device.

    Raises:
        RuntimeError: if it does what a graph can't hold.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class GraphedModel:
    """A model whose steps are replayed; prompts, and steps with ``active``, go to ``model``."""

    def __init__(self, model: CausalLM, record: Recorder = cuda_graph) -> None:
        """Records single rows at once.

        Raises:
            RuntimeError: if that can't be done.
        """
        self.model = model
        self.embedding = model.embedding
        self.init_state = model.init_state
        self.prefill = model.prefill
        self._record = record
        self._structure = tree_flatten(model.init_state(1))[1]
        self._seen: Counter[int] = Counter()
        self._steps: dict[int, _Recording] = {}
        with torch.inference_mode():
            self._steps[1] = self._recording(1)

    @torch.inference_mode()
    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """As :meth:`CausalLM.step`."""
        rows = tokens.shape[0]
        if active is not None:
            return self.model.step(tokens, state, active)
        if rows not in self._steps:
            self._seen[rows] += 1
            if self._seen[rows] < _WORTH_IT:
                return self.model.step(tokens, state)
            self._steps[rows] = self._recording(rows)
        logits, *parts = self._steps[rows]([tokens, *tree_flatten(state)[0]])
        return logits, tree_unflatten(parts, self._structure)

    def _recording(self, rows: int) -> _Recording:
        tokens = torch.zeros(rows, dtype=torch.long, device=self.embedding.weight.device)
        inputs = [tokens, *tree_flatten(self.model.init_state(rows))[0]]

        def run(tokens: Tensor, *parts: Tensor) -> list[Tensor]:
            logits, state = self.model.step(tokens, tree_unflatten(list(parts), self._structure))
            return [logits, *tree_flatten(state)[0]]

        return _Recording(run, inputs, self._record)


class _Recording:
    """A function on fixed tensors, which inputs are copied into and outputs out of."""

    def __init__(self, run: Callable[..., list[Tensor]], inputs: list[Tensor], record: Recorder) -> None:
        self._inputs = inputs
        self._outputs: list[Tensor] = []

        def fixed() -> None:
            self._outputs[:] = run(*inputs)

        self._replay = record(fixed)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self._inputs, inputs)
        self._replay()
        return [output.clone() for output in self._outputs]
