"""Selection of the kind of speculative decoding by name: ``ngram``, or the draft model of that name."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.errors import UserError
from tnnlm.inference.engine import Engine, open_engine
from tnnlm.inference.speculation import NgramSpeculation, Speculation
from tnnlm.inference.speculation_compiled import SpeculativeModel
from tnnlm.inference.speculation_draft import DraftSpeculation
from tnnlm.inference.speculation_width import WIDTHS, PassCosts
from tnnlm.models.causal_lm import CausalLM
from tnnlm.trust import Trust

NGRAM = "ngram"
"""Name of proposals from the text itself."""


def choose_speculation(
    name: str, engine: Engine, weights: int, runs_dir: Path, *, dtype: str, trust: Trust
) -> Speculation:
    """Return a kind of speculative decoding.

    Args:
        name: ``ngram``, or a converted model as :func:`tnnlm.inference.load.load` takes it.
        engine: Engine that checks the proposals.
        weights: Number of weights of its model.
        runs_dir: Folder that contains the runs.
        dtype: Dtype of the weights of a draft model.
        trust: Code that may run although this machine hasn't made it or run it before.

    Raises:
        UserError: If the draft model can't be loaded, or has another tokenizer.
    """
    # Work on a GPU has not ended when a pass returns.
    measured = engine.info.device == "cpu"
    model = engine.generator.model
    widths = model.widths if isinstance(model, SpeculativeModel) else WIDTHS
    if name == NGRAM:
        return NgramSpeculation(partial(PassCosts, widths, measured=measured))
    try:
        found, converted = load_for_decoding(name, runs_dir, trust)
    except UserError as error:
        raise UserError(f"--speculate {name}: {error.reason}", error.remedy) from None
    if converted.tokenizer.fingerprint != engine.generator.tokenizer.fingerprint:
        raise UserError(
            f"--speculate {name}: its tokenizer is not that of the model",
            f"give a model that was trained with the same tokenizer, or {NGRAM}",
        )
    relative_cost = n_weights(converted.model) / weights
    folder = found if found.is_dir() else None
    draft = open_engine(converted, folder, device=engine.generator.device, dtype=dtype, trust=trust).generator
    return DraftSpeculation(
        draft.model,
        draft.token_logits,
        relative_cost,
        draft.tokenizer.eos_id,
        (PassCosts(widths, measured=measured), PassCosts(widths, measured=False)),
    )


def n_weights(model: CausalLM) -> int:
    """Return the number of weights of a model whose layers have not been replaced."""
    return sum(parameter.numel() for parameter in model.parameters())
