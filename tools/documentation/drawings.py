"""Figures of docs/explanation, plotted from the kernels of a trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiments.report import Line, Panel, figure, line, smallest_shown
from tnnlm import convert_taps
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.conversion.linalg import compress, hankel_svd
from tnnlm.kernels import Kernel

ORDERS = (2, 4, 6, 8, 12, 16, 24, 32)
"""Orders of the balanced reductions that are plotted."""
_RANK = 64
"""Combinations of channels that the Hankel singular values are computed from."""
_SIZE = (7.0, 4.2)
_PERIOD = 8
"""Lags that are averaged to one plotted point."""


def draw_taps(kernels: list[Kernel], path: Path) -> None:
    """Plot the root mean square over channels of every layer's taps, with the decay as the envelope.

    Args:
        kernels: Trained kernels, one per layer.
        path: File of the figure, PNG.
    """
    lags = list(range(0, 1024, _PERIOD))
    lines = []
    for layer, kernel in enumerate(kernels):
        size = _rms(_taps(kernel, 1024))
        lines.append(line(f"layer {layer}", [(i, float(size[i])) for i in lags], marker=""))
    decay = kernels[0].decay
    assert decay is not None
    envelope = [float(decay.mean()) ** i for i in lags]
    lines.append(Line("decay^lag", lags, envelope, {"color": "grey", "linestyle": "--"}))
    _save("Taps of a trained Toeplitz network", lines, "lag", "|k|, root mean square over channels", path)


def draw_etsc(kernel: Kernel, training_length: int, path: Path) -> None:
    """Plot the error of ETSC at every lag, for the training length and for a sufficient horizon.

    Args:
        kernel: A trained kernel with a decay.
        training_length: Lags of the shorter horizon.
        path: File of the figure, PNG.
    """
    longer = auto_horizon(kernel, training_length)
    assert longer is not None
    k = _taps(kernel, 2 * longer)
    lines = []
    for horizon in (training_length, longer):
        found = etsc(k[:, :horizon], kernel.decay)
        error = _rms(found.taps(k.shape[1]) - k) / k.norm() * k.shape[0] ** 0.5
        points = [(i, max(float(error[i : i + _PERIOD].max()), 1e-18)) for i in range(0, k.shape[1], _PERIOD)]
        lines.append(line(f"horizon {horizon:,}", points, marker=""))
    _save("Error of ETSC at each lag", lines, "lag", "error over the kernel's norm", path)


def draw_reduction(kernels: list[Kernel], horizon: int, path: Path) -> dict[str, list[dict[str, float]]]:
    """Plot the Hankel-norm error of balanced reduction against its order, with the lower bound.

    Args:
        kernels: Trained kernels, one per layer.
        horizon: Lags that are reduced.
        path: File of the figure, PNG.

    Returns:
        By layer, a row per order: ``order``, ``bound`` (the next Hankel singular value over the largest),
        ``hankel_error`` (over the largest Hankel singular value; missing where the bound is rounding) and
        ``tap_error``.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    lines = []
    for layer, kernel in enumerate(kernels):
        k = _taps(kernel, 2 * horizon)
        sigma = hankel_svd(compress(k, _RANK).unsqueeze(0), max(ORDERS) + 1, horizon)[0][0]
        own = rows[f"layer {layer}"] = []
        for order in ORDERS:
            _, report = convert_taps(k[:, :horizon], method="balanced", order=order)
            row = {"order": report.order, "bound": float(sigma[report.order] / sigma[0])}
            row["tap_error"] = report.relative_tap_error
            if report.hankel_ratio is not None:
                row["hankel_error"] = report.hankel_ratio * row["bound"]
            own.append(row)
        colour = f"C{layer}"
        reached = [(row["order"], row["hankel_error"]) for row in own if "hankel_error" in row]
        lines.append(line(f"layer {layer}", reached, color=colour))
        bound = [(row["order"], smallest_shown(row["bound"])) for row in own]
        lines.append(line(f"layer {layer}, lower bound", bound, color=colour, linestyle=":", marker=""))
    _save(
        "Balanced reduction", lines, "order: state numbers per channel", "Hankel-norm error, relative", path
    )
    return rows


def _taps(kernel: Kernel, length: int) -> Tensor:
    with torch.no_grad():
        return kernel(length).double()


def _rms(k: Tensor) -> Tensor:
    return k.square().mean(0).sqrt()


def _save(title: str, lines: list[Line], below: str, left: str, path: Path) -> None:
    axes = {"xlabel": below, "ylabel": left, "yscale": "log"}
    figure([Panel(title, lines, axes=axes)], path, size=_SIZE)
