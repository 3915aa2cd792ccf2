"""Tokenizers of imported models: the user's file, or the letters of DNA for HyenaDNA."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tnnlm.errors import DataError
from tnnlm.tokenizer import TextTokenizer, ended
from tnnlm.tokenizer import load_tokenizer as read_tokenizer

EOS_TOKEN = "<|endoftext|>"
"""Default of ``--eos-token``."""
DNA_EOS_TOKEN = "[SEP]"
"""End token of HyenaDNA."""
DNA = ("[CLS]", DNA_EOS_TOKEN, "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN")
"""Vocabulary of HyenaDNA (arXiv 2306.15794), index = token id."""


def load_tokenizer(format: str, path: Path | None, eos_token: str | None) -> TextTokenizer:
    """Return the tokenizer of an imported model.

    Args:
        format: Format of the checkpoint.
        path: A tokenizer.json; None takes the tokenizer of the format.
        eos_token: End-of-document token; None takes that of the format.

    Raises:
        DataError: If no tokenizer is given and the format has none, or the file is not a tokenizer.json, or
            the tokenizer lacks the token or has it as ordinary text only.
    """
    if path is None and format == "hyenadna":
        token = DNA_EOS_TOKEN if eos_token is None else eos_token
        return ended(_letters(), token, f"--format {format}", "--eos-token")
    if path is None:
        raise DataError(f"--format {format}: the checkpoint has no tokenizer", "give one with --tokenizer")
    if not path.is_file():
        raise DataError(f"{path}: no such file", "give a tokenizer.json with --tokenizer")
    token = EOS_TOKEN if eos_token is None else eos_token
    return read_tokenizer(str(path), token, "--eos-token")


def _letters() -> Tokenizer:
    """Return the tokenizer of HyenaDNA: one token per letter, and [UNK] for all but the letters of DNA."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(DNA)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([token for token in DNA if len(token) > 1])
    return tokenizer
