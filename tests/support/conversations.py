"""Tables of small conversations for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config

TINY = (
    "data.batch_size=4",
    "data.val_fraction=0.1",
    "data.max_val_tokens=400",
    "model.d_model=32",
    "model.n_layers=2",
    "model.vocab_size=300",
    "model.max_length=96",
    "model.kernel.rpe_dim=16",
    "model.kernel.rpe_layers=2",
    "model.kernel.decay=0.95",
    "trainer.max_steps=6",
    "trainer.val_every_n_steps=6",
    "trainer.log_every_n_steps=2",
    "trainer.sample_tokens=4",
    "trainer.accelerator=cpu",
    "checkpoint.every_n_steps=3",
)
"""Settings of a run of a few seconds."""


def turn(role: str, content: str) -> dict[str, str]:
    """Return a message."""
    return {"role": role, "content": content}


def chats(n: int = 40) -> list[dict[str, Any]]:
    """Return rows of different lengths with the column ``messages``."""
    return [
        {
            "messages": [
                turn("system", "Be brief."),
                turn("user", f"What is {i} plus {i}?"),
                turn("assistant", f"{2 * i}"),
                turn("user", "Why?"),
                turn("assistant", "Because. " * (1 + i % 5)),
            ]
        }
        for i in range(n)
    ]


def pairs(n: int = 40) -> list[dict[str, Any]]:
    """Return rows with the columns ``prompt`` and ``completion`` as strings."""
    return [{"prompt": f"Count to {i}:", "completion": " ".join(map(str, range(i % 9)))} for i in range(1, n)]


def write_rows(rows: list[Any], name: str = "chat.jsonl") -> Path:
    """Write rows to a .jsonl file in the folder of the test."""
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(path: Path, kind: str = "chat", *overrides: str) -> Config:
    """Return the settings of a tiny run on conversations."""
    return load_config(None, [*TINY, f"data.files={path}", f"data.format={kind}", *overrides])
