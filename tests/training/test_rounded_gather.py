"""Gathers in bfloat16 change no loss and no gradient, and evaluation gathers in float32."""

from __future__ import annotations

import pytest

from tests.support.gather_worker import compare
from tests.support.models import tiny_config
from tests.support.ranks import free_port, run_processes
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.rounded_gather import only_linear


@pytest.mark.parametrize("recompute", [False, True])
def test_rounded_gathers_are_exact_under_autocast(recompute: bool) -> None:
    port = str(free_port())
    assert run_processes(compare, [(rank, 2, port, recompute) for rank in range(2)]) == [0, 0]


@pytest.mark.parametrize(("block", "linear"), [("tnn", True), ("s4", False), ("hyena", False)])
def test_blocks_with_other_parameters_are_not_rounded(block: str, linear: bool) -> None:
    expand = 3 if block == "tnn" else 1
    assert only_linear(CausalLM(tiny_config(block=block, expand=expand)).layers[0]) is linear
