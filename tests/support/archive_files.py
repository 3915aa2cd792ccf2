"""Small files in the published layout of the Long Range Arena, with a few rows of each task."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

DIFFICULTY = "curv_contour_length_14"


def write_listops(root: Path, rows: int = 12) -> None:
    folder = root / "listops-1000"
    folder.mkdir(parents=True)
    for offset, split in enumerate(("train", "val", "test")):
        lines = ["Source\tTarget"]
        for i in range(rows):
            low, high = sorted((i % 10, (i + offset) % 10))
            lines.append(f"( ( ( [MIN {high} ) {low} ) ] )\t{low}")
        (folder / f"basic_{split}.tsv").write_bytes("\r\n".join(lines).encode() + b"\r\n")


def write_retrieval(root: Path, rows: int = 6) -> None:
    folder = root / "tsv_data"
    folder.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        lines = [
            f"{i % 2}.0\tP0{i}-1001\tW0{i}-2002\tb'First {split} {i}'\tb'\"Second\" caf\xe9 {i}'"
            for i in range(rows)
        ]
        (folder / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_text(root: Path, rows: int = 5) -> None:
    for split in ("train", "test"):
        for kind in ("neg", "pos"):
            folder = root / "aclImdb" / split / kind
            folder.mkdir(parents=True)
            for i in range(rows):
                (folder / f"{i}_{7 if kind == 'pos' else 2}.txt").write_text(
                    f"{split} {kind} review {i}<br />"
                )


def write_image(root: Path, rows: int = 4) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {
            b"batch_label": name.encode(),
            b"labels": [int(label) for label in rng.integers(0, 10, rows)],
            b"data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8),
            b"filenames": [b"a.png"] * rows,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_pictures(root: Path, name: str, side: int, rows: int = 20) -> None:
    folder = root / name / DIFFICULTY
    (folder / "metadata").mkdir(parents=True)
    for part in range(2):
        (folder / f"imgs/{part}").mkdir(parents=True)
        lines = []
        for i in range(rows // 2):
            grey = np.full((side, side), 10 * part + i, dtype=np.uint8)
            grey[0, 0] = 255 * (i % 2)
            Image.fromarray(grey).save(folder / f"imgs/{part}/sample_{i}.png")
            lines.append(f"imgs/{part} sample_{i}.png {i} {i % 2} 1.8 6 2.0 5 3 0.75 {side}")
        (folder / f"metadata/{part}.npy").write_text("\n".join(lines) + "\n")


WRITERS = {
    "listops": write_listops,
    "retrieval": write_retrieval,
    "text": write_text,
    "image": write_image,
    "pathfinder": lambda root: write_pictures(root, "pathfinder32", 32),
    "pathx": lambda root: write_pictures(root, "pathfinder128", 128),
}
