"""Tables of the memory per device that ``train.py --dry-run`` estimates, by strategy and devices."""

from __future__ import annotations

from tnnlm.config.loader import load_config
from tnnlm.config.shipped import find_config
from tnnlm.training.estimate import estimate_run
from tnnlm.training.memory import estimate_memory

DEVICES = (1, 8, 64)
"""Numbers of devices of a table; 64 are eight nodes."""
_ROWS = {
    "ddp": ("trainer.strategy=ddp",),
    "ddp, recompute": ("trainer.strategy=ddp", "trainer.recompute=true"),
    "fsdp": ("trainer.strategy=fsdp",),
    "fsdp, recompute": ("trainer.strategy=fsdp", "trainer.recompute=true"),
}


def memory_table(config: str, *overrides: str) -> str:
    """Return the estimated GiB per device as a table: a row per strategy, a column per number of devices.

    The first line states the number of parameters.

    Args:
        config: Name of a shipped configuration.
        overrides: Settings that replace those of the file, ``KEY=VALUE``.
    """
    head = " | ".join(["strategy", *(f"{n} device{'s' * (n > 1)}" for n in DEVICES)])
    lines = [f"| {head} |", "|---|" + "---:|" * len(DEVICES)]
    params = 0
    for name, settings in _ROWS.items():
        cells = []
        for devices in DEVICES:
            nodes = max(1, devices // 8)
            words = (f"trainer.devices={devices // nodes}", f"trainer.num_nodes={nodes}")
            loaded = load_config(find_config(config), [*overrides, *settings, *words])
            params = estimate_run(loaded).params
            needed = devices > 1 or "ddp" in name
            cells.append(f"{estimate_memory(loaded).peak / 2**30:.1f}" if needed else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    changed = "".join(f", `{word}`" for word in overrides)
    return "\n".join([f"`{config}`{changed}: {params:,} parameters, GiB per device", "", *lines])
