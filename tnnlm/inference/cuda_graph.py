"""Decoding step as a CUDA graph, captured once per size of the batch and replayed with a single launch.

A step of a small model runs hundreds of GPU kernels that take microseconds each, so launch overhead
dominates. Input and output states are copied, so callers may fork and keep them as with the eager model.
Batches are padded to a power of two, so that few graphs serve every size; their kernels share one pool of
memory, and the least recently used graph is freed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tnnlm.inference.flat_step import after_step, flat_step, parts_read
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import fused_steps, recurrences

Recorder: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Function that captures a function without arguments and returns one that replays it on the same tensors."""
_WARM_UP = 3
"""Eager runs before the capture."""
_WORTH_IT = 4
"""Number of steps of one size before its graph is captured; batch sizes change whenever rows finish."""
_KEPT = 4
"""Number of graphs that are kept, each with separate inputs and outputs."""
_MOST_ROWS = 256
"""Largest batch that is captured; kernels of larger ones take longer than their launches."""


class GraphRecorder:
    """Recorder of CUDA graphs on one GPU, which need not be the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture ``run`` as a CUDA graph and return its replay function.

        Raises:
            RuntimeError: If ``run`` contains an operation that can't be captured.
        """
        # Streams, captures and replays use the current device, which is cuda:0 unless it is set.
        with torch.cuda.device(self.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            # Graphs may share memory because outputs are copied before the next replay.
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay


class GraphedModel:
    """Model that replays captured steps.

    ``model`` runs prompts and steps with ``active``. The work of a step for later tokens follows it.
    """

    def __init__(self, model: CausalLM, record: Recorder | None = None, fused: bool = True) -> None:
        """Capture the step of a single row.

        Args:
            model: Converted model with packed linear layers.
            record: Function that captures a step; None captures CUDA graphs on the model's GPU.
            fused: Whether captured steps use the operators of :mod:`tnnlm.ops.fused`.

        Raises:
            RuntimeError: If the step can't be captured.
        """
        self.model = model
        self.embedding = model.embedding
        self.init_state = model.init_state
        self.prefill = model.prefill
        self.steps = model.steps
        self._record = record or GraphRecorder(model.embedding.weight.device)
        self._fused = fused
        self._recurrences = recurrences(model)
        self._seen: Counter[int] = Counter()
        self._steps: OrderedDict[int, _Recording] = OrderedDict()
        with torch.inference_mode():
            self._steps[1] = self._recording(1)

    @torch.inference_mode()
    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process one token per row; see :meth:`CausalLM.step`."""
        rows = 1 << (tokens.shape[0] - 1).bit_length()
        if active is not None or rows > _MOST_ROWS:
            return self.model.step(tokens, state, active)
        if rows not in self._steps:
            self._seen[rows] += 1
            if self._seen[rows] < _WORTH_IT:
                return self.model.step(tokens, state)
            if len(self._steps) >= _KEPT:
                freed, _ = self._steps.popitem(last=False)
                del self._seen[freed]
            self._steps[rows] = self._recording(rows)
        self._steps.move_to_end(rows)
        outputs = self._steps[rows]([tokens, *parts_read(state)])
        return after_step(self._recurrences, state, outputs)

    def _recording(self, rows: int) -> _Recording:
        tokens = torch.zeros(rows, dtype=torch.long, device=self.embedding.weight.device)
        inputs = [tokens, *parts_read(self.model.init_state(rows))]
        empty = self.model.init_state(1)  # outside of the capture

        def run(tokens: Tensor, *parts: Tensor) -> list[Tensor]:
            with fused_steps(self.model) if self._fused else nullcontext():
                return flat_step(self.model, tokens, empty, parts)

        return _Recording(run, inputs, self._record)


class _Recording:
    """Captured function on static tensors; a call copies inputs in and outputs out, for its first rows."""

    def __init__(self, run: Callable[..., list[Tensor]], inputs: list[Tensor], record: Recorder) -> None:
        self._inputs = inputs
        self._outputs = outputs = list[Tensor]()

        def fixed() -> None:  # without a reference to this object, which would delay freeing the graph
            outputs[:] = run(*inputs)

        self._replay = record(fixed)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        rows = len(inputs[0])
        # The rows beyond keep the inputs of an earlier call, and no row depends on another.
        torch._foreach_copy_([static[:rows] for static in self._inputs], inputs)
        self._replay()
        outputs = [output[:rows] for output in self._outputs]
        copies = [torch.empty_like(output) for output in outputs]
        torch._foreach_copy_(copies, outputs)
        return copies
