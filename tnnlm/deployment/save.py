"""``tnnlm.save``, which converts a model in memory and writes it as a converted folder, and its lock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tnnlm.checkpoints.converted import check_tokenizer, save_converted
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, describe, measure
from tnnlm.errors import CheckpointError, UserError
from tnnlm.files import only_process, remove_leftovers
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, recurrences
from tnnlm.tokenizer import TextTokenizer


def save(
    model: CausalLM,
    tokenizer: TextTokenizer,
    folder: str | Path,
    recipe: ConversionConfig | None = None,
    *,
    force: bool = False,
    inference_only: bool = False,
    **options: Any,
) -> Path:
    """Write a converted folder, which ``tnnlm.load``, generate.py, the server and Transformers load.

    Args:
        model: Trained or converted model. A trained model is not modified; its converted copy is saved with
            the certificate in conversion.json. The errors of a converted model can't be measured, and
            conversion.json contains a warning instead.
        tokenizer: Tokenizer that the model was trained with.
        folder: Output folder, which is written atomically.
        recipe: Settings for the conversion of a trained model; None builds them from ``options``.
        force: Replace a converted model at ``folder``.
        inference_only: Omit the kernels of a trained model, without which no run can start from the folder.
        options: Fields of :class:`tnnlm.config.schema.ConversionConfig`, such as ``method="balanced"``.

    Returns:
        Path of the folder.

    Raises:
        CheckpointError: If ``folder`` exists and ``force`` is not set, another process writes to it, or the
            tokenizer does not fit.
        UserError: If ``model`` is not a causal language model, can't be converted, or is packed for decoding.
    """
    folder = Path(folder)
    if not isinstance(model, CausalLM):
        raise UserError(
            f"model: a {type(model).__name__} can't be saved", "pass a CausalLM, such as LitModel.model"
        )
    if model.head is not None:
        raise UserError(
            "model: is packed for decoding, its original weights were deleted", "save it before packing"
        )
    if folder.exists() and not force:
        raise CheckpointError(f"{folder}: exists already", "pass another folder, or force=True to replace it")
    check_tokenizer(tokenizer, model, folder)
    if recurrences(model) and (recipe is not None or options):
        raise UserError("model: is converted already", "omit the conversion settings")
    with only_writer(folder):
        if recurrences(model):
            save_converted(folder, model, tokenizer, describe(model), force)
            return folder
        recipe = recipe or ConversionConfig(**options)
        started = time.perf_counter()
        horizon, layers = convert_layers(model, recipe)
        seconds = time.perf_counter() - started
        report = measure(model, layers, method=recipe.method, horizon=horizon, seconds=seconds)
        converted = attach(model, [layer.params for layer in layers])
        kept = None if inference_only else model
        save_converted(folder, converted, tokenizer, report, force, kept)
    return folder


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Let no other process write to the folder of a converted model, and remove what a killed one left in it.

    Raises:
        CheckpointError: If another process writes to it.
    """
    refusal = CheckpointError(f"{folder}: another process is writing to it", "wait until it finishes")
    with only_process(folder, refusal):
        remove_leftovers(folder, owned="*")
        yield
