"""Number of operators of one decoding step, each of which is a kernel launch on a GPU."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.scripts import ROOT
from tnnlm.config.loader import load_config
from tnnlm.conversion import convert_model
from tnnlm.inference.linear import cast_linear, replace_linears
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import fused_steps, within_turns

MOST = 80
"""Largest number of launches per token of the model of configs/tnn_wt103.yaml."""
SMALL = "model.d_model=16 model.glu_dim=16 model.vocab_size=64 model.kernel.rpe_dim=8 model.max_length=64"


class Launches(TorchDispatchMode):
    """Count the operators that are called, except those that return a view of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launches(model: CausalLM, *, fused: bool) -> Counter[str]:
    """Return the operators of one step of a single row, from the embedding to the logits."""
    tokens, state = torch.tensor([3]), model.init_state(1)
    with within_turns(model), fused_steps(model) if fused else nullcontext(), Launches() as mode:
        model.step(tokens, state)
    return mode.counts


# In inference mode composite operators are not split into those that launch a kernel.
@torch.no_grad()
def test_a_fused_step_has_few_launches() -> None:
    # The number does not depend on widths, so that narrow layers are enough.
    model = CausalLM(load_config(ROOT / "configs" / "tnn_wt103.yaml", SMALL.split()).model).eval()
    converted = convert_model(model, method="balanced")
    replace_linears(converted, partial(cast_linear, dtype=torch.float32))
    plain, fused = launches(converted, fused=False), launches(converted, fused=True)
    print(f"launches per token: {plain.total()} plain, {fused.total()} fused")
    layers = len(converted.layers)
    assert fused["tnnlm.gated_step.default"] == layers == 7
    assert fused["tnnlm.rms_norm.default"] == 2 * layers
    assert fused.total() <= MOST < plain.total()
