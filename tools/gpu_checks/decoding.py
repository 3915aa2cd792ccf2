"""Decoding steps of converted models in bfloat16, compared with the rate of a copy.

The recurrences have random poles and residues, because the speed does not depend on their values.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.timing import clock
from gpu_checks.rows import Emit
from gpu_checks.shapes import LARGE, SMALL, Setting, Shape
from tnnlm.config.schema import ModelConfig
from tnnlm.inference.cuda_graph import GraphedModel
from tnnlm.inference.linear import replace_linears
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.models.causal_lm import CausalLM, state_bytes
from tnnlm.modules import RecurrentConv
from tnnlm.ops.fused import why_not_fused
from tnnlm.ops.ssm import SSMParams

BATCHES = (1, 64, 256)
MODES = 16
"""Modes per channel of the recurrences, 32 real numbers of state, about those of a tolerance of 1e-3."""
_GROUP, _GROUPS, _WARM_UP = 8, 25, 8
"""Steps per timed group, groups, and untimed steps, among which the engine captures its graph."""


def small(setting: Setting, emit: Emit) -> None:
    """Decode with the model of 48.7M parameters."""
    _decode(setting.sized(SMALL), setting, emit)


def large(setting: Setting, emit: Emit) -> None:
    """Decode with the model of 1.3B parameters."""
    _decode(setting.sized(LARGE), setting, emit)


def step_bytes(model: ModelConfig, batch: int) -> int:
    """Return the bytes that one step of a batch has to move.

    Weights of all matrices in bfloat16 and the recurrences in float32 are read once; the states of all rows
    in float32 are read and written.
    """
    inner, hidden = model.expand * model.d_model, model.glu_dim or model.d_model
    weights = model.n_layers * 3 * model.d_model * (inner + hidden) + model.d_model * model.vocab_size
    numbers = model.n_layers * inner * 2 * MODES
    return 2 * weights + 4 * numbers + 2 * batch * 4 * numbers


def _decode(shape: Shape, setting: Setting, emit: Emit) -> None:
    model, engine = _engine(shape.model, setting.device)
    for batch in (1, 3) if setting.tiny else BATCHES:
        state = model.init_state(batch)
        per_step = _seconds(model, batch, state, setting)
        emit(
            {
                "kind": "decoding",
                "shape": shape.name,
                "engine": engine,
                "batch": batch,
                "state_bytes": state_bytes(state) // batch,
                "seconds_per_step": per_step,
                "tokens_per_second": batch / per_step,
                "bytes_per_second": step_bytes(shape.model, batch) / per_step,
            }
        )


@torch.inference_mode()
def _seconds(model: Any, batch: int, state: Any, setting: Setting) -> float:
    """Return the median seconds of a step of ``batch`` rows."""
    tokens = torch.zeros(batch, dtype=torch.long, device=setting.device)
    ends = time.monotonic() + setting.seconds / len(BATCHES)
    groups: list[float] = []
    run = partial(_steps, model, tokens, state)
    run(_WARM_UP)
    for _ in range(2 if setting.tiny else _GROUPS):
        groups.append(clock(partial(run, _GROUP)) / _GROUP)
        if time.monotonic() > ends:
            break
    return statistics.median(groups)


def _steps(model: Any, tokens: Tensor, state: Any, count: int) -> None:
    for _ in range(count):
        _, state = model.step(tokens, state)


def _engine(config: ModelConfig, device: torch.device) -> tuple[Any, str]:
    """Return a converted model in bfloat16 with the fastest engine for the device, and its name."""
    channels = config.expand * config.d_model
    with device:
        torch.manual_seed(0)
        convs = [RecurrentConv(_recurrence(channels)) for _ in range(config.n_layers)]
        model = CausalLM(config, convs).eval().requires_grad_(False)
    replace_linears(model, choose_linear(device, "bfloat16").make)
    if device.type != "cuda":
        return model, "packed"
    missing = why_not_fused(device)
    return GraphedModel(model, fused=not missing), "graph" + (f" ({missing})" if missing else ", fused")


def _recurrence(channels: int) -> SSMParams:
    radius, angle = 0.9 + 0.09 * torch.rand(MODES), torch.pi * torch.rand(MODES)
    poles = torch.stack((radius * angle.cos(), radius * angle.sin())).double()
    return SSMParams(torch.zeros(channels, 0), poles, torch.randn(channels, 2, MODES) / MODES)
