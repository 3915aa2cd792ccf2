"""Metrics as plain lines, where there is no terminal."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from tnnlm.training.loggers import LocalLogger
from tnnlm.training.loggers.names import LENGTH, Place, columns_at


class PlainLines(LocalLogger):
    """A line per log, for output that is no terminal."""

    def __init__(self, max_steps: int) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.console = Console()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the line."""
        named = columns_at(Place.LINE)
        shown = [
            f"{key.removeprefix('train/')} {value:.5g}" for key, value in metrics.items() if key in named
        ]
        lags = [int(value) for key, value in metrics.items() if key.startswith(LENGTH)]
        if lags:
            shown.append(f"lags {min(lags)} to {max(lags)}")
        line = f"step {step}/{self.max_steps}  " + "  ".join(shown)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
