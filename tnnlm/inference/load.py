"""From a path to a model that generates text, in one call: ``tnnlm.load``."""

from __future__ import annotations

from pathlib import Path

from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.inference.engine import Engine, open_engine, usable_device
from tnnlm.inference.generator import TextGenerator


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    engine: str = "auto",
    runs_dir: str | Path = "runs",
) -> TextGenerator:
    """Load a converted model, ready to generate: ``tnnlm.load("runs/demo")("def main(")``.

    Args:
        path: a converted folder, a run by path or by its name under ``runs_dir``, or a checkpoint with
            recurrences attached, as train.py writes them. None takes the newest converted folder.
        device: a name of torch's, or ``auto`` for a GPU if there is one.
        dtype: of the weights of linear layers and head: float32, bfloat16 or int8.
        engine: one of :data:`tnnlm.inference.engine.ENGINES`; ``auto`` is the fastest that runs here.
        runs_dir: where runs lie.

    Returns:
        the model with its tokenizer. Its layers are packed for decoding: it can't be saved or trained, see
        :func:`tnnlm.checkpoints.locate.load_trained` for a model that can.

    Raises:
        CheckpointError: if there is no model, it is damaged, or it is not converted.
        UserError: for a device, dtype or engine that can't be used here.
    """
    target = None if path is None else str(path)
    return load_engine(target, Path(runs_dir), device=device, dtype=dtype, engine=engine).generator


def load_engine(target: str | None, runs_dir: Path, *, device: str, dtype: str, engine: str) -> Engine:
    """Find and load a converted model; arguments and what is raised are those of :func:`load`."""
    where = usable_device(device)
    found, converted = load_for_decoding(target, runs_dir)
    folder = found if found.is_dir() else None
    return open_engine(converted, folder, device=where, dtype=dtype, engine=engine)
