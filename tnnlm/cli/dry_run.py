"""Output of ``train.py --dry-run``: changed settings, sizes and estimated memory of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from tnnlm.config.loader import changed_settings
from tnnlm.config.schema import Config
from tnnlm.config.yaml_files import write_yaml
from tnnlm.conversion.checks import check_training
from tnnlm.errors import UserError, one_line
from tnnlm.training.announce import in_units, memory_lines
from tnnlm.training.components import check_components
from tnnlm.training.estimate import check_names, estimate_run
from tnnlm.training.fsdp import choose_strategy
from tnnlm.training.memory import RunMemory, estimate_memory
from tnnlm.training.optim import check_optimizer


def show(config: Config, as_json: bool) -> None:
    """Print settings, parameters, tokens and estimated memory of a run, as YAML and text or as JSON.

    The memory is null in JSON if the code of a custom kernel can't be run without values.
    """
    check_names(config)
    choose_strategy(config)
    check_training(config)
    check_components(config)
    check_optimizer(config.optim)
    if config.task == "classify":
        from tnnlm.data.sequences.prepare import check_sequence_model

        check_sequence_model(config)
    plan, memory = estimate_run(config), memory_or_reason(config)
    if as_json:
        sizes: dict[str, Any] = {**asdict(plan), "memory_bytes": None, "memory": None}
        if not isinstance(memory, str):
            parts = {name: getattr(memory, name) for name in ("state", "buckets", "step", "validation")}
            attached = memory.attached and memory.attached.nbytes(config.model.n_layers)
            sizes |= {"memory_bytes": memory.peak, "memory": {**parts, "attached": attached or 0}}
        print(json.dumps({"config": asdict(config), **sizes}, indent=2))
        return
    print("# Settings that differ from their defaults; --print-config prints all")
    changed = changed_settings(config)
    print(write_yaml(changed) if changed else "# none\n")
    frozen = f", {plan.frozen:,} frozen" if plan.frozen else ""
    fixed = f", and {plan.buffers:,} values in buffers" if plan.buffers else ""
    print(f"params: {plan.params:,} trainable{frozen}{fixed}")
    print(f"tokens per update: {plan.tokens_per_update:,} ({plan.total_tokens:,} in total)")
    print("data: not read by --dry-run")
    if isinstance(memory, str):
        print(f"estimated memory: unknown, because {memory}")
        return
    print(f"estimated memory: {in_units(memory.peak)} per device ({plan.devices}), {plan.precision}")
    print(*memory_lines(config, memory), sep="\n")
    if config.init.lora.rank is not None:
        print("  estimated as if all weights were trained; adapters take less")


def memory_or_reason(config: Config) -> RunMemory | str:
    """Return the estimated memory of a run, or why it can't be estimated with a kernel of the user's own.

    The estimate runs a kernel over tensors without values, which code that reads values can't process.
    """
    try:
        return estimate_memory(config)
    except UserError:
        raise
    except Exception as error:
        module = config.model.kernel.module
        if module is None:  # a bug of this package
            raise
        return f"{module} fails with tensors without values ({one_line(error)})"
