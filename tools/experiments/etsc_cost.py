"""Seconds and bytes of one more token: recomputed, from the cached history, by ETSC, and by our own form."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.experiment import Row
from tnnlm.config.schema import ModelConfig
from tnnlm.conversion import convert_model
from tnnlm.models.causal_lm import CausalLM, ModelState, state_bytes

VOCABULARY = 256
"""small, so that what is timed is the mixing"""
_ROUNDS = 7
_SECONDS = 0.02
"""of a turn: short steps are repeated within it"""


def forms(model: CausalLM, length: int) -> dict[str, CausalLM]:
    """Name -> what decodes after ``length`` tokens; the model itself recomputes them all.

    A window of ``length`` inputs is the cached history: every one of them is multiplied by its tap again.
    """
    return {
        "recompute": model,
        "cached history": convert_model(model, method="window", horizon=length),
        "etsc, n = length": convert_model(model, method="etsc", horizon=length),
        "etsc, n = horizon": convert_model(model, method="etsc"),
        "balanced": convert_model(model, method="balanced"),
    }


@torch.inference_mode()
def token_cost(length: int, width: int, depth: int) -> Row:
    """Of every form at a context of ``length`` tokens, in turns.

    Args:
        length: tokens before the one that is timed.
        width: d_model; three times as many channels are convolved.
        depth: layers.

    Returns:
        by form ``seconds`` (median) and ``bytes``: of the state that is kept, and of what the step
        allocates meanwhile at its peak; for ``recompute`` the tokens are the state.
    """
    torch.manual_seed(0)
    shape = ModelConfig(d_model=width, n_layers=depth, vocab_size=VOCABULARY, max_length=length)
    made = forms(CausalLM(shape).eval(), length)
    tokens = torch.randint(VOCABULARY, (1, length))
    steps = {name: _stepper(name, model, tokens) for name, model in made.items()}
    kept = {
        name: tokens.nbytes if name == "recompute" else state_bytes(model.init_state(1))
        for name, model in made.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 + _ROUNDS):
        for name, step in steps.items():
            seconds = _turn(step)
            if turn:
                times[name].append(seconds)
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "bytes": {name: kept[name] + peak_allocated(step) for name, step in steps.items()},
        "kept": kept,
    }


def _stepper(name: str, model: CausalLM, tokens: Tensor) -> Callable[[], Any]:
    if name == "recompute":
        return lambda: model(tokens)
    # Any state costs the same; noise, so that no number is a denormal one.
    layers = (type(part)(*map(torch.randn_like, part)) for part in model.init_state(1).layers)
    state = ModelState(tuple(layers))
    return lambda: model.step(tokens[:, -1], state)


def _turn(step: Callable[[], Any]) -> float:
    """Seconds of one step: the fastest would flatter, the mean of a short turn is what it takes."""
    step()  # what the turn before left in the caches goes
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < _SECONDS:
        step()
        count += 1
    return (time.perf_counter() - started) / count


def peak_allocated(run: Callable[[], Any]) -> int:
    """Bytes on the CPU that a call holds at its peak beyond what was there before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as prof:
        run()
    held = peak = 0
    results = prof.profiler.kineto_results
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return int(peak)
