"""Time per token and state of a converted model against the length of the context: constant, or not?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.subjects import WIDTHS, linear_weights
from benchmarks.timing import row
from experiments.timing import interleaved, read_bandwidth
from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.inference.engine import open_engine
from tnnlm.inference.generator import Context, TextGenerator
from tnnlm.models.causal_lm import state_bytes


def time_contexts(
    model: str | None, contexts: Sequence[int], turns: int, steps: int, *, engine: str, dtype: str
) -> dict[str, Any]:
    """Seconds per greedy token after contexts of every length, which take turns.

    Args:
        model: converted folder, run or checkpoint; None: the newest.
        contexts: tokens.
        turns: of each context, after two that warm up.
        steps: tokens timed per turn.
        engine: as :func:`tnnlm.inference.engine.open_engine` takes it.
        dtype: of the weights.

    Returns:
        ``model``, ``engine``, ``bandwidth_gbs``, ``floor_seconds`` (of reading weights and state once),
        ``ratio_longest_to_shortest`` and ``results``: rows as of :func:`benchmarks.timing.time_steps`, with
        ``prefill_seconds``.

    Raises:
        UserError: if there is no such model.
    """
    folder, converted = load_for_decoding(model, Path("runs"))
    weights = linear_weights(converted.model) + converted.model.embedding.weight.numel()
    writer, info = open_engine(converted, folder, dtype=dtype, engine=engine)
    vocabulary = converted.tokenizer.size
    read = {n: writer.read_tokens([torch.arange(n).remainder(vocabulary).tolist()]) for n in contexts}
    cases = {n: partial(_take_steps, writer, context, steps) for n, context in read.items()}
    times = interleaved(cases, turns, warm_up=2)
    rows = []
    for n, context in read.items():
        own = row("recurrent step", dtype, 1, n, [seconds / steps for seconds in times[n]])
        rows.append(own | {"state_bytes": state_bytes(context.state), "prefill_seconds": context.seconds})
    bandwidth = read_bandwidth()
    touched = weights * WIDTHS[dtype] + 2 * rows[0]["state_bytes"]
    return {
        "model": str(folder),
        "engine": str(info),
        "bandwidth_gbs": bandwidth,
        "floor_seconds": touched / (1e9 * bandwidth),
        "ratio_longest_to_shortest": rows[-1]["seconds_per_token"] / rows[0]["seconds_per_token"],
        "results": rows,
    }


@torch.inference_mode()
def _take_steps(writer: TextGenerator, context: Context, n: int) -> None:
    """Greedy tokens on top of ``context``, which stays as it is."""
    state, token = context.state, context.logits.argmax(-1)
    for _ in range(n):
        logits, state = writer.model.step(token, state)
        token = logits.argmax(-1)
