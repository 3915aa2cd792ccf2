"""Pictures of experiments on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tnnlm.files import atomic_file


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as PNG, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
