"""RTF's memory tasks at growing state sizes: what is learned, what it costs, and what the recurrence keeps.

Copying and Delay of the RTF paper (arXiv 2405.06147, section 4.2), with TNN and SGConv beside RTF. Every
model is trained in its parallel form, converted, and tested in both: the recurrence reads the test set one
position after the other. The small size is the published one divided by eight in length, state and delay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnnlm.config import OptimConfig
from tnnlm.ops import recurrence
from tnnlm.reproduce import synthetic_report
from tnnlm.reproduce.experiment import Experiment, Row, Verdict
from tnnlm.reproduce.synthetic_cost import measure_cost
from tnnlm.reproduce.synthetic_models import Model, answers, answers_by_steps, build_model, convert_by_family
from tnnlm.reproduce.synthetic_tasks import Batch, copying, delay
from tnnlm.training.optim import build_optimizer, build_scheduler

OTHERS = ("tnn", "sgconv")
_TEST_SEED = 1 << 20
"""of the test set; seeds of the training are below"""
_TEST_ROWS = 64
"""tested at a time: the states of all of them are held"""
_COPYING: Row = {"task": "copying", "init": "xavier", "constraint": "montel", "layers": 4, "decay": 0.99}
_DELAY: Row = {"task": "delay", "init": "zero", "constraint": "none", "layers": 1, "decay": 0.99}
_COST: Row = {"task": "cost", "batch": 4, "d_model": 64}
_SETTINGS: dict[str, tuple[tuple[int, ...], Row, Row, Row]] = {
    "tiny": (
        (4, 16),
        {"d_model": 32, "vocab_size": 10, "lag": 16, "length": 32, "batch": 8, "steps": 150, "lr": 1e-2, "test_rows": 32},
        {"d_model": 4, "lag": 12, "length": 48, "batch": 16, "steps": 400, "lr": 1e-2, "test_rows": 32},
        {"state_sizes": [4, 64], "length": 512, "rounds": 5},
    ),
    "small": (
        (8, 16, 32, 64, 128),
        {"d_model": 64, "vocab_size": 64, "lag": 128, "length": 256, "batch": 8, "steps": 800, "lr": 4e-3, "test_rows": 256},
        {"d_model": 4, "lag": 125, "length": 500, "batch": 16, "steps": 4000, "lr": 3e-3, "test_rows": 256},
        {"state_sizes": [64, 128, 256, 512, 1024], "length": 2048, "rounds": 15},
    ),
    "paper": (
        (64, 128, 256, 512, 1024),
        {"d_model": 64, "vocab_size": 64, "lag": 1024, "length": 2048, "batch": 8, "steps": 62_500, "lr": 1e-3, "test_rows": 1000},
        {"d_model": 4, "lag": 1000, "length": 4000, "batch": 64, "steps": 5120, "lr": 1e-3, "test_rows": 1024},
        {"state_sizes": [64, 128, 256, 512, 1024], "length": 4096, "rounds": 50},
    ),
}
"""state sizes of RTF, and what Copying, Delay and the timing differ in"""
