"""From a model in memory to a converted folder, in one call: ``tnnlm.save``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tnnlm.checkpoints.converted import check_tokenizer, save_converted
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, describe, measure
from tnnlm.errors import CheckpointError, UserError
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
    **options: Any,
) -> Path:
    """Write a converted folder, which ``tnnlm.load``, generate.py, the server and Transformers read.

    Args:
        model: a trained model, which is converted on the way and left as it is, with its certificate in
            conversion.json; or a converted one. How far that is off can't be measured any more, and
            conversion.json says so.
        tokenizer: of the text that it was trained on.
        folder: where to; it appears whole or not at all.
        recipe: how to convert a trained model; None makes one of ``options``.
        force: replace a converted model at ``folder``.
        options: fields of :class:`tnnlm.config.schema.ConversionConfig`, such as ``method="balanced"``.

    Returns:
        ``folder``.

    Raises:
        CheckpointError: if ``folder`` exists and ``force`` is not set, or the tokenizer does not fit.
        UserError: if ``model`` is not a causal language model, can't be converted, or is packed for decoding.
    """
    folder = Path(folder)
    if not isinstance(model, CausalLM):
        raise UserError(
            f"a {type(model).__name__} can't be saved", "give a CausalLM, as LitModel.model is one"
        )
    if model.head is not None:
        raise UserError("this model is packed for decoding, its weights are gone", "save it before that")
    if folder.exists() and not force:
        raise CheckpointError(f"{folder}: exists already", "give another folder, or force=True to replace it")
    check_tokenizer(tokenizer, model, folder)
    if recurrences(model):
        if recipe is not None or options:
            raise UserError("this model is converted already", "leave the settings of a conversion out")
        save_converted(folder, model, tokenizer, describe(model), force)
        return folder
    recipe = recipe or ConversionConfig(**options)
    started = time.perf_counter()
    horizon, layers = convert_layers(model, recipe)
    seconds = time.perf_counter() - started
    report = measure(model, layers, method=recipe.method, horizon=horizon, seconds=seconds)
    converted = attach(model, [layer.params for layer in layers])
    save_converted(folder, converted, tokenizer, report, force)
    return folder
