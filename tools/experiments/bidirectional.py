"""TNN's other half: models that read a text as a whole, guess hidden tokens and value expressions."""

from __future__ import annotations

from experiments.frame import Experiment
from experiments.listops import LISTOPS
from experiments.masked import MASKED

BIDIRECTIONAL = Experiment(
    name="bidirectional", title="Two-sided Toeplitz neural networks", sections=(MASKED, LISTOPS)
)
