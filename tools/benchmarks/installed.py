"""The model and engine that a user gets without options: train.py, then convert.py, then generate.py.

The weights are those of one optimizer step on the sources of Python's standard library, because speed does
not depend on them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch import Tensor

from benchmarks.subjects import WIDTHS, InPlaceSteps, linear_weights
from experiments.timing import Stepper, Subject, random_tokens
from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError
from tnnlm.inference.engine import open_engine
from tnnlm.models.causal_lm import state_bytes
from tnnlm.trust import NO_CODE, Trust

DEFAULT = "default"
"""Name of the engine that generate.py selects for what convert.py has written."""
ROOT = Path(__file__).parents[2]
_VALIDATED = 4096
"""Tokens to validate on, which bounds the time of the perplexities."""


def train_run(shape: ModelConfig, folder: Path) -> Path:
    """Train a model of this shape for one step with train.py and return the folder of its run.

    Args:
        shape: Configuration of the model.
        folder: Folder in which the run is created.

    Raises:
        UserError: If training fails.
    """
    sizes = ("d_model", "n_layers", "vocab_size", "max_length", "glu_dim")
    settings = [f"model.{name}={getattr(shape, name)}" for name in sizes]
    settings += ["name=benchmark", f"runs_dir={folder}", "data.source=stdlib", "data.batch_size=1"]
    settings += [f"data.max_val_tokens={_VALIDATED}", "trainer.max_steps=1"]
    run_command("train.py", *settings)
    return folder / "benchmark"


def install(shape: ModelConfig, folder: Path) -> Path:
    """Train a run and convert it with convert.py's defaults; return the folder of the converted model."""
    run = train_run(shape, folder)
    run_command("convert.py", str(run))
    return run / "converted"


def run_command(script: str, *words: str) -> None:
    """Run a script of the checkout.

    Raises:
        UserError: If its exit code is not 0; the message is its last line.
    """
    command = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{script}: {lines[-1].removeprefix('error: ')}")


def default_subject(folder: Path, trust: Trust = NO_CODE) -> tuple[Subject, str]:
    """Return a converted model with the engine that generate.py selects for it, and the engine in one line.

    Args:
        folder: Folder of the converted model.
        trust: Whether code that the model carries or names may run.
    """
    found, converted = load_for_decoding(str(folder), Path("runs"), trust)
    weights = linear_weights(converted.model) + converted.model.embedding.weight.numel()
    generator, info = open_engine(converted, found, trust=trust)
    model, vocabulary = generator.model, converted.tokenizer.size

    def step_at(batch: int, context: int) -> Stepper:
        state = generator.prefill_tokens(random_tokens(batch, context, vocabulary).tolist())
        return Stepper(InPlaceSteps(model, state.logits.argmax(-1), state.model_state), None)

    def read(prompt: Tensor) -> object:
        return generator.prefill_tokens(prompt.tolist())

    def size(context: int) -> int:
        return state_bytes(model.init_state(1))

    width = WIDTHS[info.dtype]
    return Subject(f"tnnlm-{DEFAULT}", info.dtype, weights * width, step_at, read, size), str(info)
