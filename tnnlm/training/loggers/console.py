"""Lines on the console, such as the metrics of each logged step where the output is not a terminal."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from tnnlm.training.loggers import LocalLogger
from tnnlm.training.loggers.names import LENGTH, Place, columns_at


def show_line(text: str) -> None:
    """Print a line to stdout without markup and without wrapping it."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


class PlainLines(LocalLogger):
    """Logger that prints the metrics of each logged step as one line."""

    def __init__(self, max_steps: int) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.console = Console()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Print the metrics of a step as one line."""
        named = columns_at(Place.LINE)
        shown = [
            f"{key.removeprefix('train/')} {value:.5g}" for key, value in metrics.items() if key in named
        ]
        lags = [int(value) for key, value in metrics.items() if key.startswith(LENGTH)]
        if lags:
            shown.append(f"effective length {min(lags)} to {max(lags)}")
        line = f"step {step}/{self.max_steps}  " + "  ".join(shown)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
