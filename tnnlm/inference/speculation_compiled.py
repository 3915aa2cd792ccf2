"""Compiled passes over several tokens of a sequence, for speculative decoding (``--compile speculate``).

A package checks a fixed number of tokens. Its linear layers are written as one sum of products per token over
the same loops, which compile to a single loop nest that reads the weights once. The package returns the state
after each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from tnnlm.checkpoints.converted import ConvertedModel, model_fingerprint
from tnnlm.errors import UserError
from tnnlm.inference.aot import check_before_compiling, package_path, use_linears
from tnnlm.inference.aot_package import Run, compile_package, load_package
from tnnlm.inference.decoder import DecoderModel
from tnnlm.inference.engine import Engine, open_engine
from tnnlm.inference.flat_step import after_step, parts_changed, parts_read, with_parts_read
from tnnlm.inference.linear import NarrowLinear
from tnnlm.inference.row_linear import RowLinear, row_linear, stored
from tnnlm.inference.speculation_width import PASS_WIDTHS, pass_name
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.surgery import recurrences, shared_copy, within_turns
from tnnlm.ops.recurrence import Params, tokens_to_work_ahead
from tnnlm.trust import NO_CODE, Trust


class PassLinear(NarrowLinear):
    """Linear layer y = x W^T + b for the K tokens of a pass, as products and sums.

    The sums of all tokens have the same loops and read the same weights, so that they are compiled to one
    loop nest with K accumulators, which reads W once. The inputs are stored before it, as those of
    :class:`tnnlm.inference.row_linear.RowLinear` are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (1, K, I) -> (1, K, O)."""
        weight = self.weight.to(x.dtype)
        sums = [(row.unsqueeze(-2) * weight).sum(-1) for row in stored(x).unbind(1)]
        return self.completed(torch.stack(sums, dim=1))


class EachRow(nn.Module):
    """Linear layer for a single row, applied to each token of a pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (1, K, I) -> (1, K, O)."""
        return torch.stack([self.layer(row) for row in x.unbind(1)], dim=1)


class _Pass(nn.Module):
    """Wrapper of ``steps`` that takes and returns parts of the states, as a compiled step does."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        empty = self.model.init_state(1)
        with within_turns(self.model):
            logits, states = self.model.steps(tokens, with_parts_read(empty, parts))
        # Few large outputs: each tensor that a package returns takes a microsecond.
        changed = zip(*map(parts_changed, states), strict=True)
        return (logits, *(torch.stack(places) for places in changed))


class SpeculativeModel:
    """Model whose passes over several tokens run in packages; everything else is done by another model."""

    def __init__(self, model: DecoderModel, plain: CausalLM, passes: Mapping[int, Run]) -> None:
        """Set up the model.

        Args:
            model: Model that decodes.
            plain: Converted model that it runs.
            passes: Packages by their number of tokens.
        """
        self.model = model
        self.embedding = model.embedding
        self.init_state = model.init_state
        self.prefill = model.prefill
        self.step = model.step
        self.step_in_place = model.step_in_place
        self.widths = (1, *sorted(passes))
        """Numbers of tokens per pass that are fast."""
        self._passes = passes
        self._recurrences = recurrences(plain)

    def steps(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, Sequence[ModelState]]:
        """Process K tokens per row (B, K); see :meth:`CausalLM.steps`."""
        rows, width = tokens.shape
        run = self._passes.get(width) if rows == 1 else None
        if run is None or not self._within_turns(state, width):
            return self.model.steps(tokens, state)
        logits, *parts = run(tokens, *(part.contiguous() for part in parts_read(state)))
        return logits, _States(self._recurrences, state, logits, parts)

    def _within_turns(self, state: ModelState, width: int) -> bool:
        """Return whether no work for later tokens is due before the last token of a pass."""
        pairs = zip(self._recurrences, state.layers, strict=True)
        return all(width <= tokens_to_work_ahead(params, layer) for params, layer in pairs)


class _States(Sequence[ModelState]):
    """States after each token of a pass, which are put together when they are needed."""

    def __init__(
        self,
        recurrences: Sequence[Params],
        state: ModelState,
        logits: Tensor,
        parts: list[Tensor],
    ) -> None:
        """Take logits (1, K, V), and the parts of all states that a pass changes, (K, ...) each."""
        self._recurrences, self._before, self._logits, self._parts = recurrences, state, logits, parts

    def __len__(self) -> int:
        return self._logits.shape[1]

    @overload
    def __getitem__(self, index: int) -> ModelState: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ModelState]: ...

    def __getitem__(self, index: int | slice) -> ModelState | Sequence[ModelState]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        own = [part[index] for part in self._parts]
        return after_step(self._recurrences, self._before, (self._logits, *own))[1]


def compile_pass(model: CausalLM, folder: Path, dtype: str, fingerprint: str, width: int) -> Path:
    """Compile passes over ``width`` tokens into ``folder``; see :func:`tnnlm.inference.aot.compile_step`.

    Raises:
        UserError: See :func:`tnnlm.inference.aot.compile_step`.
    """
    check_before_compiling(model, fingerprint)
    path = package_path(folder, pass_name(width, dtype))
    parts = [part.contiguous() for part in parts_read(model.init_state(1))]
    example = (torch.zeros(1, width, dtype=torch.long), *parts)
    compile_package(_pass(model, dtype), example, path, fingerprint)
    return path


def load_passes(model: CausalLM, folder: Path, dtype: str, trust: Trust = NO_CODE) -> dict[int, Run]:
    """Load the compiled passes of a model by their number of tokens; none if they were not compiled.

    Args:
        model: Converted model with plain linear layers, whose weights the packages use; it is not modified.
        folder: Folder of the converted model.
        dtype: Dtype of the weights.
        trust: Whether packages that this machine didn't compile may run.

    Raises:
        UserError: If a package doesn't fit this model, machine or version of PyTorch, or is not trusted.
    """
    paths = {width: package_path(folder, pass_name(width, dtype)) for width in PASS_WIDTHS}
    found = {width: path for width, path in paths.items() if path.is_file()}
    if not found:
        return {}
    # What was compiled for other weights must not run with these.
    fingerprint = model_fingerprint(model)
    function = _pass(shared_copy(model), dtype)  # one copy of rounded weights for all of them
    return {width: load_package(path, lambda: function, fingerprint, trust) for width, path in found.items()}


def open_with_passes(
    converted: ConvertedModel,
    folder: Path | None,
    *,
    device: torch.device,
    dtype: str,
    engine: str,
    trust: Trust,
) -> Engine:
    """Open a converted model like :func:`tnnlm.inference.engine.open_engine`, with its compiled passes.

    If the compiled engine is selected and there are no compiled passes, ``info.reason`` says why.
    """
    passes: dict[int, Run] = {}
    missing = "no compiled passes over several tokens; create them with convert.py --compile speculate"
    if device.type == "cpu" and folder is not None and engine in ("auto", "compiled"):
        try:
            passes = load_passes(converted.model, folder, dtype, trust)
        except UserError as error:
            missing = str(error)
    generator, info = open_engine(converted, folder, device=device, dtype=dtype, engine=engine, trust=trust)
    if passes:
        generator.model = SpeculativeModel(generator.model, converted.model, passes)
    elif info.name == "compiled":
        info = replace(info, reason="; ".join(filter(None, (info.reason, missing))))
    return Engine(generator, info)


def _pass(model: CausalLM, dtype: str) -> _Pass:
    """Return a pass over several tokens, with layers of ``model`` replaced in place."""

    def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
        single = row_linear(weight, bias, dtype)
        return PassLinear(weight, bias, dtype) if isinstance(single, RowLinear) else EachRow(single)

    use_linears(model, linear)
    return _Pass(model)
