"""Every metric of a run: its name in the files, what it is called on a screen, and where it is shown."""

from __future__ import annotations

from enum import Flag, auto
from typing import NamedTuple

LENGTH, ORDER = "kernel/length", "kernel/order"
"""per layer: ``kernel/length/0`` is the effective length of the first"""


class Place(Flag):
    """Where a metric is shown or written."""

    CSV = auto()
    """a column of metrics.csv in every run"""
    LAYERS = auto()
    """a column of metrics.csv for every layer, ``NAME/LAYER``"""
    CAUSAL = auto()
    """a column of metrics.csv where the task is causal; so for the other two tasks"""
    MASKED = auto()
    CLASSIFY = auto()
    LINE = auto()
    """the plain lines of a training without a terminal"""
    TABLE = auto()
    """the table that compares runs, of tools/plot_run.py"""
    SUMMARY = auto()
    """summary.json and the table at the end of a run, for tasks with a test split"""
    VALIDATED = CAUSAL | MASKED | CLASSIFY


class Metric(NamedTuple):
    """One metric."""

    column: str
    """its name in metrics.csv or in summary.json"""
    title: str
    unit: str = ""
    shown: Place = Place(0)
    short: str = ""
    """its name on the progress bar; empty: it is not shown there"""

    @property
    def label(self) -> str:
        """Title and unit, for a table or a legend."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


METRICS = (
    Metric("step", "step", "", Place.CSV | Place.TABLE),
    Metric("train/loss", "training loss", "nats", Place.CSV | Place.LINE | Place.TABLE, "loss"),
    Metric("train/lr", "learning rate", "", Place.CSV | Place.LINE),
    Metric(
        "train/tokens_per_second",
        "throughput",
        "tokens/s",
        Place.CSV | Place.LINE | Place.TABLE,
        "tokens/s",
    ),
    Metric("train/skipped", "skipped steps", "", Place.CSV),
    Metric("train/step_seconds", "step", "seconds", Place.CSV),
    Metric("train/data_seconds", "waiting for data", "seconds", Place.CSV | Place.LINE),
    Metric("train/grad_norm", "gradient norm", "", Place.CSV | Place.LINE, "norm"),
    Metric("train/tflops", "speed of the model", "TFLOP/s per device", Place.CSV),
    Metric("train/memory_gib", "memory", "GiB", Place.CSV | Place.TABLE),
    Metric("val/loss", "validation loss", "nats", Place.VALIDATED),
    Metric("val/ppl", "perplexity", "", Place.CAUSAL | Place.LINE | Place.TABLE),
    Metric("val/ppl_masked", "masked perplexity", "", Place.MASKED | Place.LINE | Place.TABLE, "val ppl"),
    Metric("val/accuracy", "accuracy", "", Place.CLASSIFY | Place.LINE | Place.TABLE, "val accuracy"),
    Metric("val/bpb", "bits per byte", "", Place.CAUSAL | Place.LINE | Place.TABLE, "val bpb"),
    Metric("val/ppl_recurrent", "recurrent perplexity", "", Place.CAUSAL | Place.LINE | Place.TABLE),
    Metric("val/bpb_recurrent", "recurrent bits per byte", "", Place.CAUSAL),
    Metric("val/ppl_gap", "relative gap", "", Place.CAUSAL | Place.LINE),
    Metric(LENGTH, "effective length", "lags", Place.LAYERS | Place.TABLE),
    Metric(ORDER, "Hankel order", "", Place.LAYERS | Place.TABLE),
    Metric("val/accuracy_best", "best accuracy", "", Place.SUMMARY),
    Metric("test/accuracy", "accuracy of the best on the test split", "", Place.SUMMARY),
    Metric("test/majority", "of naming its commonest class", "", Place.SUMMARY),
)
"""in the order of the columns of metrics.csv, which a resumed run goes on with"""
BY_COLUMN = {metric.column: metric for metric in METRICS}


def metrics_at(place: Place) -> tuple[Metric, ...]:
    """What is shown there, in the order of :data:`METRICS`."""
    return tuple(metric for metric in METRICS if metric.shown & place)


def columns_at(place: Place) -> tuple[str, ...]:
    """The columns of what is shown there."""
    return tuple(metric.column for metric in metrics_at(place))


def csv_columns(task: Place, n_layers: int) -> tuple[str, ...]:
    """Columns of metrics.csv, in order."""
    layers = (f"{name}/{layer}" for name in columns_at(Place.LAYERS) for layer in range(n_layers))
    return (*columns_at(Place.CSV), *columns_at(task), *layers)
