"""Tables of the memory per device that ``train.py --dry-run`` estimates, by strategy and devices."""

from __future__ import annotations

import torch

from tnnlm.config.loader import load_config
from tnnlm.config.shipped import find_config
from tnnlm.models.factory import build_model
from tnnlm.training.estimate import SHARDING, sharded_bytes
from tnnlm.training.memory import estimate_memory

DEVICES = (1, 8, 64)
"""Numbers of devices of a table; 64 are eight nodes."""
_STRATEGIES = ("ddp", "fsdp", "hsdp")


def memory_table(config: str, *overrides: str) -> str:
    """Return the estimated GiB per GPU as a table: a row per strategy, a column per number of devices.

    The first line states the number of parameters. Sharding changes the state only, so that two steps are
    enough for all rows: one with and one without ``trainer.recompute``.

    Args:
        config: Name of a shipped configuration.
        overrides: Settings that replace those of the file, ``KEY=VALUE``.
    """
    head = " | ".join(["strategy", *(f"{n} device{'s' * (n > 1)}" for n in DEVICES)])
    lines = [f"| {head} |", "|---|" + "---:|" * len(DEVICES)]
    path, common = find_config(config), [*overrides, "trainer.accelerator=cuda"]
    with torch.device("meta"):
        model = build_model(load_config(path, common))
    kinds = {"": "false", ", recompute": "true"}
    memories = {}
    for kind, recompute in kinds.items():
        words = ["trainer.strategy=ddp", "trainer.devices=8", f"trainer.recompute={recompute}"]
        memories[kind] = estimate_memory(load_config(path, [*common, *words]))
    for strategy in _STRATEGIES:
        for kind, memory in memories.items():
            cells = []
            for devices in DEVICES:
                nodes = max(1, devices // 8)
                words = [f"trainer.devices={devices // nodes}", f"trainer.num_nodes={nodes}"]
                given = load_config(path, [*common, f"trainer.strategy={strategy}", *words])
                shards = strategy in SHARDING
                state = sharded_bytes(given, model) if shards else memory.state
                cells.append("-" if shards and devices == 1 else _gib(memory.peak - memory.state + state))
            lines.append(f"| {strategy}{kind} | {' | '.join(cells)} |")
    changed = "".join(f", `{word}`" for word in overrides)
    return "\n".join([f"`{config}`{changed}: {model.n_params:,} parameters, GiB per device", "", *lines])


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
