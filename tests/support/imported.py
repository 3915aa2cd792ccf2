"""Checkpoints of other implementations, and tokenizers for them, for the tests of the import."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from string import ascii_letters

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.support.reference import reference

PLACES = {"logits", "tokens", "features_before_norm"}
"""Tensors of the reference case of a TNN that are no weights."""


def tnn_weights(prefix: str = "decoder.") -> dict[str, Tensor]:
    """Return the weights of the reference TNN language model, named as fairseq does."""
    tensors, _ = reference("tnn_lm_fairseq_wiring")
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items() if key not in PLACES}


def write_fairseq(path: Path = Path("checkpoint_best.pt")) -> Path:
    """Write the reference TNN language model as fairseq does, with its options and the state of training."""
    weights = {**tnn_weights(), "decoder.version": torch.tensor([3.0])}
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"].clone()
    torch.save(
        {
            "args": Namespace(arch="tnn", gamma=0.99),
            "model": weights,
            "optimizer_history": [{"num_updates": 7, "lr_scheduler_state": {"best": None}}],
            "extra_state": {"epoch": 1, "val_loss": 2.0},
        },
        path,
    )
    return path


def write_tokenizer(size: int, path: Path = Path("tokenizer.json")) -> Path:
    """Write a tokenizer of single letters with ``size`` tokens, of which the last is <|endoftext|>."""
    letters = ascii_letters[: size - 1]
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path))
    return path
