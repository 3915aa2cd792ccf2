"""Peak memory of training steps, compared with the estimate of ``train.py --dry-run``."""

from __future__ import annotations

import torch

from gpu_checks.rows import Emit
from gpu_checks.shapes import DEMO, MEDIUM, SMALL, Setting
from gpu_checks.training import release, training_step
from tnnlm.errors import one_line
from tnnlm.training.memory import estimate_memory

_STEPS = 3


def measure(setting: Setting, emit: Emit) -> None:
    """Measure steps of several models in both precisions; a CPU reports estimates only."""
    for given, precision, recompute in (
        (DEMO, "bf16-mixed", False),
        (SMALL, "32-true", False),
        (SMALL, "bf16-mixed", False),
        (MEDIUM, "bf16-mixed", True),
        (MEDIUM, "bf16-mixed", False),
    ):
        shape = setting.sized(given)
        memory = estimate_memory(shape.config(setting.device.type, precision, recompute))
        row = {
            "kind": "memory",
            "shape": shape.name,
            "variant": precision + (", recompute" if recompute else ""),
            "estimated": memory.step,
            "measured": None,
        }
        release(setting.device)
        try:
            model, step = training_step(shape, setting.device, precision)
            model.recompute = recompute
            for _ in range(_STEPS):
                step()
            if setting.device.type == "cuda":
                row["measured"] = torch.cuda.max_memory_allocated(setting.device)
            del model, step
        except RuntimeError as error:  # of which running out of memory is one
            row["failed"] = one_line(error)
        emit(row)
