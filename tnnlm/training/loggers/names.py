"""Every metric of a run: name in files, display title, unit, and where it is shown."""

from __future__ import annotations

from enum import Flag, auto
from typing import NamedTuple

LENGTH, ORDER = "kernel/length", "kernel/order"
"""Prefixes of per-layer metrics; ``kernel/length/0`` is the effective length of the first layer."""


class Place(Flag):
    """Places where a metric is shown or written."""

    CSV = auto()
    """Column of metrics.csv in every run."""
    LAYERS = auto()
    """Column of metrics.csv for every layer, called ``NAME/LAYER``."""
    CAUSAL = auto()
    """Column of metrics.csv for the task causal."""
    MASKED = auto()
    """Column of metrics.csv for the task masked."""
    CLASSIFY = auto()
    """Column of metrics.csv for the task classify."""
    LINE = auto()
    """Log line of a training without a terminal."""
    TABLE = auto()
    """Table of tools/plot_run.py, which compares runs."""
    SUMMARY = auto()
    """Entry of summary.json and of the final table, for tasks with a test split."""
    VALIDATED = CAUSAL | MASKED | CLASSIFY
    """Column of metrics.csv for every task."""


class Metric(NamedTuple):
    """Metric with its display properties."""

    column: str
    """Name in metrics.csv or in summary.json."""
    title: str
    """Title in tables and plots."""
    unit: str = ""
    """Unit; empty for dimensionless metrics."""
    shown: Place = Place(0)
    """Where the metric is shown or written."""
    short: str = ""
    """Name on the progress bar; empty hides it there."""

    @property
    def label(self) -> str:
        """Title with unit, for tables and legends."""
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
    Metric("train/tflops", "model throughput", "TFLOP/s per device", Place.CSV),
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
    Metric("val/ppl_word", "perplexity per word", "", Place.CAUSAL),
    Metric("val/accuracy_best", "best validation accuracy", "", Place.SUMMARY),
    Metric("test/accuracy", "test accuracy of the best checkpoint", "", Place.SUMMARY),
    Metric("test/majority", "majority-class accuracy on the test split", "", Place.SUMMARY),
)
"""All metrics, in the order of the columns of metrics.csv.

This order must not change, because a resumed run appends to its file.
"""
BY_COLUMN = {metric.column: metric for metric in METRICS}
"""All metrics by column name."""


def metrics_at(place: Place) -> tuple[Metric, ...]:
    """Return the metrics shown at ``place``, in the order of :data:`METRICS`."""
    return tuple(metric for metric in METRICS if metric.shown & place)


def columns_at(place: Place) -> tuple[str, ...]:
    """Return the column names of the metrics shown at ``place``."""
    return tuple(metric.column for metric in metrics_at(place))


def csv_columns(task: Place, n_layers: int) -> tuple[str, ...]:
    """Return the column names of metrics.csv, in order."""
    columns: list[str] = []
    for metric in METRICS:
        if metric.shown & Place.LAYERS:
            columns += (f"{metric.column}/{layer}" for layer in range(n_layers))
        elif metric.shown & (Place.CSV | task):
            columns.append(metric.column)
    return tuple(columns)
