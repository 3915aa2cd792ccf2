"""Tiny runs on a generated text, for the tests of training and of the scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.training.loggers.csv import read_metrics

SETTINGS = (
    "data.source=files",
    "data.files=text.txt",
    "data.batch_size=4",
    "data.val_fraction=0.05",
    "model.d_model=32",
    "model.n_layers=2",
    "model.vocab_size=400",
    "model.max_length=32",
    "model.kernel.rpe_dim=16",
    "model.kernel.rpe_layers=2",
    "model.kernel.decay=0.95",
    "trainer.max_steps=20",
    "trainer.val_every_n_steps=8",
    "trainer.log_every_n_steps=5",
    "trainer.sample_prompt=The ",
    "trainer.sample_tokens=5",
    "trainer.accelerator=cpu",
    "checkpoint.every_n_steps=7",
)

OTHER_DATA = tuple(word for word in SETTINGS if not word.startswith(("data.source", "data.files")))
"""Settings for data that a test selects."""


def write_text(path: Path = Path("text.txt")) -> Path:
    """Write about 60 kB of English prose, the licence and documentation of Python."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    return path


@contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """Work in a folder, with a cache of tokenized data in it, inside a ``with`` block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TNNLM_CACHE", str(folder / "cache"))
        yield folder


def tiny_run(*overrides: str) -> Config:
    """Return the settings of a run of a few seconds on ``text.txt``, which is written if missing."""
    if not Path("text.txt").exists():
        write_text()
    return load_config(None, [*SETTINGS, *overrides])


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that weights, moments and schedules are bitwise equal and that every row is logged once."""
    left, right = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (a, b))
    assert left["global_step"] == right["global_step"]
    assert left["lr_schedulers"] == right["lr_schedulers"]
    for key, value in left["state_dict"].items():
        assert torch.equal(value, right["state_dict"][key]), key
    moments = [part["optimizer_states"][0]["state"] for part in (left, right)]
    for index, state in moments[0].items():
        assert all(torch.equal(state[key], moments[1][index][key]) for key in ("exp_avg", "exp_avg_sq"))
    # Only timings may differ.
    kept = ("step", "train/loss", "train/lr", "train/skipped", "val/loss", "val/ppl_recurrent")
    rows = [[[row.get(key) for key in kept] for row in read_metrics(run / "metrics.csv")] for run in (a, b)]
    assert rows[0] == rows[1]
    if (a / "samples.txt").exists():
        assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()


def row_marks(batch: Any) -> list[int]:
    """Return a fingerprint of each row of a training batch, of any task."""
    parts = batch if isinstance(batch, tuple) else (batch,)
    flat = torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)
    return [hash(tuple(row)) for row in flat.tolist()]
