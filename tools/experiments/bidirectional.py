"""TNN's other half: models that read a text as a whole, in parts that are measured each on its own."""

from __future__ import annotations

from pathlib import Path

from experiments.experiment import Experiment, Row, Verdict
from experiments.listops_part import ListOps
from experiments.masked import Masked
from experiments.part import Part
from experiments.picture import save_picture


class Bidirectional(Experiment):
    """Hidden tokens guessed from both sides, and values of expressions."""

    name = "bidirectional"
    title = "Two-sided Toeplitz neural networks"

    parts: tuple[Part, ...] = (Masked(), ListOps())

    def cells(self, size: str) -> list[Row]:
        """Those of every part."""
        return [{"part": part.name, **cell} for part in self.parts for cell in part.cells(size)]

    def measure(self, cell: Row) -> Row:
        """As the part does."""
        (part,) = (part for part in self.parts if part.name == cell["part"])
        return part.measure(cell, self.data)

    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """Those of every part."""
        return [verdict for part in self.parts for verdict in part.verdicts(_of(part, rows))]

    def tables(self, rows: list[Row]) -> str:
        """Those of every part."""
        return "\n\n".join(part.tables(_of(part, rows)) for part in self.parts)

    def plot(self, rows: list[Row], path: Path) -> None:
        """The panels of every part side by side."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        count = sum(part.panels for part in self.parts)
        figure, axes = plt.subplots(1, count, figsize=(5 * count, 4), layout="constrained", squeeze=False)
        left = list(axes[0])
        for part in self.parts:
            part.draw(left[: part.panels], _of(part, rows))
            left = left[part.panels :]
        save_picture(figure, path)


def _of(part: Part, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["part"] == part.name]
