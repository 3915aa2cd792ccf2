"""Loading a converted model as a text generator in one call: ``tnnlm.load``."""

from __future__ import annotations

from pathlib import Path

from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.inference.engine import Engine, open_engine, usable_device
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.speculation_choice import choose_speculation, n_weights
from tnnlm.inference.speculation_compiled import open_with_passes
from tnnlm.trust import NO_CODE, Trust


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    engine: str = "auto",
    runs_dir: str | Path = "runs",
    trust: Trust = NO_CODE,
    speculate: str | None = None,
) -> TextGenerator:
    """Load a converted model for generation: ``tnnlm.load("runs/demo")("def main(")``.

    Args:
        path: Folder of a converted model, path of a run or its name under ``runs_dir``, or a checkpoint with
            attached recurrences, as train.py writes it. None loads the newest converted model.
        device: Device name as in PyTorch, or ``auto`` for a GPU if there is one.
        dtype: Dtype of the weights of linear layers and head: float32, bfloat16, float16 or int8.
        engine: One of :data:`tnnlm.inference.engine.ENGINES`; ``auto`` selects the fastest available.
        runs_dir: Folder that contains the runs.
        trust: Code that may run although this machine hasn't made it or run it before.
        speculate: Speculative decoding of single completions, which doesn't change what is generated:
            ``ngram`` proposes tokens from the text itself, and anything else is the path or name of a smaller
            converted model that proposes them.

    Returns:
        Text generator with model and tokenizer. The layers are packed for decoding, so the model can't be
        saved or trained; :func:`tnnlm.checkpoints.locate.load_trained` loads a model that can.

    Raises:
        CheckpointError: If there is no model, it is corrupt, or it is not converted.
        UserError: If a device, dtype or engine is not available on this machine.
    """
    target = None if path is None else str(path)
    return load_engine(
        target,
        Path(runs_dir),
        device=device,
        dtype=dtype,
        engine=engine,
        trust=trust,
        speculate=speculate,
    ).generator


def load_engine(
    target: str | None,
    runs_dir: Path,
    *,
    device: str,
    dtype: str,
    engine: str,
    trust: Trust = NO_CODE,
    speculate: str | None = None,
) -> Engine:
    """Find and load a converted model; arguments and exceptions are those of :func:`load`."""
    where = usable_device(device)
    found, converted = load_for_decoding(target, runs_dir, trust)
    folder = found if found.is_dir() else None
    if speculate is None:
        return open_engine(converted, folder, device=where, dtype=dtype, engine=engine, trust=trust)
    weights = n_weights(converted.model)
    opened = open_with_passes(converted, folder, device=where, dtype=dtype, engine=engine, trust=trust)
    opened.generator.speculation = choose_speculation(
        speculate, opened, weights, runs_dir, dtype=dtype, trust=trust
    )
    return opened
