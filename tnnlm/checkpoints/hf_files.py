"""What Transformers reads in a converted folder beside the weights: plain JSON and text.

Written with every conversion, so that a folder serves ``load_converted`` and ``AutoModelForCausalLM``
alike. Deployment code: imports nothing of Transformers; the model's classes are in ``tnnlm.hf``.
"""

from __future__ import annotations

import json
from typing import Any

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import recurrences
from tnnlm.tokenizer import TextTokenizer

MODEL_TYPE = "tnnlm"
"""in config.json: what Transformers knows this architecture by"""
SHIM = "modeling_tnnlm.py"
"""the file that ``auto_map`` names"""
SHIM_TEXT = '''"""Tells Transformers where this model's classes are: in the package tnnlm."""

try:
    from tnnlm.hf import TnnlmConfig, TnnlmForCausalLM
except ImportError as error:
    raise ImportError(
        f"this model runs on the package tnnlm with its extra [hf]: install it first ({error})"
    ) from error

__all__ = ["TnnlmConfig", "TnnlmForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": f"{SHIM.removesuffix('.py')}.TnnlmConfig",
    "AutoModelForCausalLM": f"{SHIM.removesuffix('.py')}.TnnlmForCausalLM",
}
EVALUATION_WINDOW = 2048
"""tokens that an evaluation shall read at a time, at least"""


def config_entries(model: CausalLM, tokenizer: TextTokenizer, report: ModelReport) -> dict[str, Any]:
    """What config.json holds for Transformers, beside our own entries."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["TnnlmForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        # Shapes of every layer's tensors, which a model is built with before its weights are read.
        "recurrences": [
            {name: list(tensor.shape) for name, tensor in params._asdict().items()}
            for params in recurrences(model)
        ],
        # Tokens that lm-evaluation-harness reads at a time: no limit of the model, it cuts text to this. A
        # conversion that is right up to its horizon only must not be measured past it.
        "n_ctx": report.horizon if report.warning else max(EVALUATION_WINDOW, model.config.max_length),
        "tokenizer_ids_sha256": tokenizer.ids_fingerprint,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }


def hf_files(model: CausalLM, tokenizer: TextTokenizer) -> dict[str, str]:
    """The files of a converted folder that Transformers alone reads, by name."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.eos_token,
        # No token is added to a text, whatever a published tokenizer.json says.
        "add_bos_token": False,
        "add_eos_token": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # A text that spells out the end token must not end the text, here as in TextTokenizer.
        "split_special_tokens": True,
    }
    generation: dict[str, Any] = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    # Entries of the embedding that the tokenizer doesn't know can't be written.
    if unknown := list(range(tokenizer.size, model.config.vocab_size)):
        generation["suppress_tokens"] = unknown
    return {
        SHIM: SHIM_TEXT,
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(generation, indent=2),
    }
