"""Configuration files that make a converted model loadable by Transformers.

Every conversion writes them, so that both ``load_converted`` and ``AutoModelForCausalLM`` accept the folder.
This module is deployment code and must not import Transformers; the model classes are in ``tnnlm.hf``.
"""

from __future__ import annotations

import json
from typing import Any

from tnnlm import __version__
from tnnlm.chat.stored import TOKENIZER_CONFIG
from tnnlm.checkpoints.bundle import standalone_code
from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.checkpoints.manifest import CHECKSUMS, CODE
from tnnlm.checkpoints.manifest import ENTRY as CHECKSUMS_ENTRY
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import recurrences
from tnnlm.tokenizer import TextTokenizer

MODEL_TYPE = "tnnlm"
"""Model type in config.json, by which Transformers identifies the architecture."""
SHIM, STANDALONE = CODE
"""File name of the custom code that ``auto_map`` refers to, and of the code that it imports where the package
is not installed."""
SHIM_TEXT = '''"""Code for Transformers: classes of the package tnnlm, or a copy where it is missing."""

try:
    from tnnlm.hf import TnnlmConfig, TnnlmForCausalLM
except ImportError:
    from .standalone_tnnlm import TnnlmConfig, TnnlmForCausalLM

__all__ = ["TnnlmConfig", "TnnlmForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": f"{SHIM.removesuffix('.py')}.TnnlmConfig",
    "AutoModelForCausalLM": f"{SHIM.removesuffix('.py')}.TnnlmForCausalLM",
}
EVALUATION_WINDOW = 2048
"""Minimum context length for evaluation, in tokens."""


def config_entries(model: CausalLM, tokenizer: TextTokenizer, report: ModelReport) -> dict[str, Any]:
    """Return the entries of config.json that Transformers needs."""
    return {
        "model_type": MODEL_TYPE,
        CHECKSUMS_ENTRY: CHECKSUMS,
        "architectures": ["TnnlmForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        # Tensor shapes of every layer, needed to build the model before its weights are loaded.
        "recurrences": [
            {name: list(tensor.shape) for name, tensor in params._asdict().items()}
            for params in recurrences(model)
        ],
        # Context length of lm-evaluation-harness, which truncates to it; the model itself has no limit. A
        # conversion that is accurate only up to its horizon must not be evaluated past it.
        "n_ctx": report.horizon if report.warning else max(EVALUATION_WINDOW, model.config.max_length),
        "tokenizer_ids_sha256": tokenizer.ids_fingerprint,
        # Rows of the embedding without a token must be neither generated nor scored.
        "missing_ids": tokenizer.missing_ids(model.config.vocab_size),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }


def code_files() -> dict[str, str]:
    """Return the Python code of a converted folder, by file name; only Transformers imports it."""
    try:
        return {SHIM: SHIM_TEXT, STANDALONE: standalone_code(__version__)}
    except OSError:  # a program that contains this package without its sources
        return {SHIM: SHIM_TEXT}


def hf_files(model: CausalLM, tokenizer: TextTokenizer) -> dict[str, str]:
    """Return the contents of the files that only Transformers reads, by file name."""
    generation: dict[str, Any] = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    # The model masks these ids itself. Where a logits processor subtracts logits, as classifier-free guidance
    # does, -inf becomes NaN, and this entry masks them again.
    if missing := tokenizer.missing_ids(model.config.vocab_size):
        generation["suppress_tokens"] = missing
    return {
        **code_files(),
        TOKENIZER_CONFIG: tokenizer_settings(tokenizer),
        "generation_config.json": json.dumps(generation, indent=2),
    }


def tokenizer_settings(tokenizer: TextTokenizer) -> str:
    """Return the content of tokenizer_config.json, with the chat template if the tokenizer has one."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.eos_token,
        # Add no special tokens to a prompt, regardless of a published tokenizer.json.
        "add_bos_token": False,
        "add_eos_token": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # The literal string of the end token must not be encoded as the end token, as in TextTokenizer.
        "split_special_tokens": True,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    return json.dumps(settings, indent=2, ensure_ascii=False)
