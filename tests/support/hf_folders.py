"""Converted folders of every family, opened by Transformers and by this package."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# Set before the libraries are imported: they copy the module of auto_map and the data of tasks into these
# folders.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf-modules-"))
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="hf-datasets-"))
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch
from torch import Tensor

from tests.support.converted import measure_model
from tests.support.models import FAMILIES, tiny_config
from tnnlm.checkpoints.converted import load_converted, save_converted
from tnnlm.conversion import convert_model
from tnnlm.inference.generator import TextGenerator
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.tokenizer import TextTokenizer, train_bpe

TEXT = (
    "The first words, some more words, and then the last words of all; 1, 2, 3 \u2014 na\u00efve caf\u00e9s."
)
FORMS = {
    "tno-balanced": ("tno", "balanced"),
    "tno-etsc": ("tno", "etsc"),
    "sgconv-window": ("sgconv", "window"),
    "rtf-companion": ("rtf", "companion"),
    "sgconv-multirate": ("sgconv", "multirate"),
}
HORIZON = 40
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


class Opened(NamedTuple):
    """Converted folder, opened by Transformers and by this package."""

    folder: Path
    model: Any
    tokenizer: Any
    own: TextGenerator

    @property
    def inner(self) -> CausalLM:
        """Return the model as this package loads it."""
        assert isinstance(self.own.model, CausalLM)
        return self.own.model


def lively_model(family: str = "tno", **changes: Any) -> CausalLM:
    """Return a random model with varied greedy output: its blocks outweigh the residual stream, and the
    zero embedding of the end token keeps it from being chosen."""
    torch.manual_seed(1)
    model = CausalLM(tiny_config(**{"kernel": FAMILIES[family](), **changes})).eval()
    with torch.no_grad():
        model.embedding.weight[0] = 0
        for block in model.layers:
            block.mixer.out_proj.weight.mul_(60)
            block.glu.out_proj.weight.mul_(60)
    return model


def make_tokenizer() -> TextTokenizer:
    return train_bpe([TEXT] * 3, 290, "<|endoftext|>", 3, False)


def write_folder(folder: Path, family: str, method: str, **changes: Any) -> Path:
    model = lively_model(family, **changes)
    converted = convert_model(model, method=method, horizon=HORIZON)
    report = measure_model(model, converted, method=method, horizon=HORIZON)
    save_converted(folder, converted, make_tokenizer(), report)
    return folder


def open_folder(folder: Path, **options: Any) -> Opened:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    loaded = load_converted(folder)
    own = TextGenerator(loaded.model, loaded.tokenizer)
    return Opened(folder, model, AutoTokenizer.from_pretrained(folder), own)


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(290, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def own_logits(opened: Opened, tokens: Tensor, state: ModelState | None = None) -> Tensor:
    """Return logits (B, L, V) of this package, with -inf at ids that the tokenizer does not have."""
    logits, _ = opened.inner.prefill(tokens, state or opened.inner.init_state(len(tokens)))
    logits[..., opened.own.tokenizer.size :] = -math.inf
    return logits


def tiny_llama() -> Any:
    """Return a random Llama with the vocabulary of :func:`lively_model`, whose greedy output varies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=tiny_config().vocab_size, initializer_range=0.5, **sizes, **ids)
    return LlamaForCausalLM(config).eval()
